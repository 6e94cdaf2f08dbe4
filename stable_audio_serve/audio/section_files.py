"""Sections of long pieces: join each section to the audio before it, and write and read its lossless file.

The files are WAV files with 32-bit floats, from which the exact samples can be read. This module does not use
libsndfile, so that it can decode a file while the file arrives from its store.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

import numpy as np

from stable_audio_serve.audio.encode import EncodedFile, encode_wav
from stable_audio_serve.audio.keep import FADE_S, fade_ramp
from stable_audio_serve.audio.loudness import measure_loudness
from stable_audio_serve.audio.peaks import treat_peaks
from stable_audio_serve.core.generation import GeneratedSpan
from stable_audio_serve.core.sound import Peaks

if TYPE_CHECKING:
    import numpy.typing as npt

_HEADER_BYTES = 58
_CHANNELS_AT = 22  # byte offset in the header
_SAMPLE_BYTES = 4

_MOST_DB = 12.0  # largest gain, in either direction
_GAIN_S = 4.0  # time in which the gain reaches its last value
_LOUDNESS_LU = 1.0  # allowed difference between the loudness of a section and its target
_WINDOWS_S = (0.25, 0.5, 1.0, 2.0)  # lengths over which the levels before and after a join are compared


def join_samples(sample_rate_hz: int) -> int:
    """Return the length of the crossfade between two sections, in samples."""
    return round(FADE_S * sample_rate_hz)


def join_section(
    audio: npt.NDArray[np.float32],
    sample_rate_hz: int,
    *,
    before: npt.NDArray[np.float32],
    num_own: int,
    span: GeneratedSpan | None,
    loudness_lufs: float | None,
    peaks: Peaks,
) -> npt.NDArray[np.float32]:
    """Return the audio of a section. It begins with the last 30 ms of `before`, crossfaded with the section.

    `before` (C, S) is the audio that the section continues. `audio` (C, S) float32 begins with `before`, and continues
    with the `num_own` samples of the section. Any samples after these are ignored. `span` is the part of `audio` that
    the model generated, if known. `loudness_lufs` is the loudness that the section should have, if known.

    The section that a model generates is often a little louder or quieter than `before`. A gain, which changes slowly,
    removes the step in level at the join, and brings the section near `loudness_lufs`.
    """
    fade, start = min(join_samples(sample_rate_hz), before.shape[1]), before.shape[1]
    own = audio[:, start - fade : start + num_own].copy()
    if span is not None and span.head.shape[1] == fade:
        own[:, :fade] = span.head
    own *= _make_gain(own, sample_rate_hz, before=before, loudness_lufs=loudness_lufs)
    own = treat_peaks(own, sample_rate_hz, peaks=peaks)
    end = before[:, start - fade :]
    own[:, :fade] = end + fade_ramp(fade) * (own[:, :fade] - end)
    return own


def _make_gain(
    own: npt.NDArray[np.float32],
    sample_rate_hz: int,
    *,
    before: npt.NDArray[np.float32],
    loudness_lufs: float | None,
) -> npt.NDArray[np.float32]:
    """Return the gain of each sample of a section (S,)."""
    first_db, last_db = _find_step(own, sample_rate_hz, before=before), 0.0
    if loudness_lufs is not None and (found := measure_loudness(own, sample_rate_hz)) is not None:
        missing_db = loudness_lufs - found
        last_db = math.copysign(min(max(abs(missing_db) - _LOUDNESS_LU, 0.0), _MOST_DB), missing_db)
    elapsed = np.arange(own.shape[1]) / min(_GAIN_S * sample_rate_hz, own.shape[1])
    gain_db = last_db + (first_db - last_db) * np.clip(1.0 - elapsed, 0.0, 1.0)
    return np.power(10.0, gain_db / 20).astype(np.float32)


def _find_step(own: npt.NDArray[np.float32], sample_rate_hz: int, *, before: npt.NDArray[np.float32]) -> float:
    """Return the gain in dB that removes the step in level at a join.

    The levels before and after the join are compared over several lengths of time. The smallest of the steps counts,
    because a larger one may come from a single sound, such as a drum. If the steps have different signs, the gain is 0.
    """
    fade = min(join_samples(sample_rate_hz), before.shape[1])
    steps_db = []
    for window_s in _WINDOWS_S:
        length = min(round(window_s * sample_rate_hz), before.shape[1], own.shape[1] - fade)
        if length:
            steps_db.append(_level_db(before[:, -length:]) - _level_db(own[:, fade : fade + length]))
    if not steps_db or min(steps_db) < 0 < max(steps_db):
        return 0.0
    smallest = min(steps_db, key=abs)
    return math.copysign(min(abs(smallest), _MOST_DB), smallest)


def _level_db(audio: npt.NDArray[np.float32]) -> float:
    """Return the audio's root mean square in dB, at least -90."""
    return 10 * math.log10(max(float(np.square(audio, dtype=np.float64).mean()), 1e-9))


def encode_section(audio: npt.NDArray[np.float32], sample_rate_hz: int) -> EncodedFile:
    """Return a WAV file with the samples `audio` (C, S) float32."""
    return encode_wav(np.ascontiguousarray(audio.T), sample_rate_hz)


class SectionDecoder:
    """Decodes a file that `encode_section` wrote. The file may arrive in chunks of any size."""

    def __init__(self) -> None:
        self._rest = b""
        self._channels = 0

    def decode(self, chunk: bytes) -> npt.NDArray[np.float32]:
        """Return the samples (C, S) float32 that `chunk` completes."""
        data = self._rest + chunk
        if not self._channels:
            if len(data) < _HEADER_BYTES:
                self._rest = data
                return np.empty((1, 0), np.float32)
            (self._channels,) = struct.unpack_from("<H", data, _CHANNELS_AT)
            data = data[_HEADER_BYTES:]
        num_whole = len(data) - len(data) % (_SAMPLE_BYTES * self._channels)
        self._rest = data[num_whole:]
        samples = np.frombuffer(data, "<f4", num_whole // _SAMPLE_BYTES).reshape(-1, self._channels)
        return np.ascontiguousarray(samples.T, np.float32)
