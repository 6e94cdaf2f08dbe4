"""Sections of long pieces: join each to the audio before it, and write and read its lossless file.

The files are WAV files with 32-bit floats, which read back exactly as they were written. They are written and read
without libsndfile, so that they can be read while they arrive from their store.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

import numpy as np

from stable_audio_serve.audio.encode import EncodedFile, encode_wav
from stable_audio_serve.audio.keep import FADE_S, fade_ramp
from stable_audio_serve.audio.peaks import treat_peaks
from stable_audio_serve.core.generation import GeneratedSpan
from stable_audio_serve.core.sound import Peaks

if TYPE_CHECKING:
    import numpy.typing as npt

_HEADER_BYTES = 58
_CHANNELS_AT = 22  # byte offset in the header
_SAMPLE_BYTES = 4

_MOST_GAIN = math.log(2.0)  # of the correction at a join: 6 dB
_GAIN_S = 4.0  # time in which the correction fades out


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
    peaks: Peaks,
) -> npt.NDArray[np.float32]:
    """Return the audio of a section, which begins with the joined last 30 ms of `before`.

    `audio` (C, S) float32 begins with `before` (C, S), the audio that the section continues; `num_own` samples of the
    section follow, and perhaps more. `span` is the part that the model generated, if known.

    A model renders the end of `before` a little louder or quieter than it is, and goes on like that. A gain that fades
    out removes this step, as far as both the rendition and the section's beginning show it.
    """
    fade, start = min(join_samples(sample_rate_hz), before.shape[1]), before.shape[1]
    own = audio[:, start - fade : start + num_own].copy()
    if span is not None and span.head.shape[1] == fade:
        own[:, :fade] = span.head
        own *= _make_gain(own, sample_rate_hz, before=before, rendition=span.before)
    own = treat_peaks(own, sample_rate_hz, peaks=peaks)
    end = before[:, start - fade :]
    own[:, :fade] = end + fade_ramp(fade) * (own[:, :fade] - end)
    return own


def _make_gain(
    own: npt.NDArray[np.float32],
    sample_rate_hz: int,
    *,
    before: npt.NDArray[np.float32],
    rendition: npt.NDArray[np.float32] | None,
) -> npt.NDArray[np.float32]:
    """Return the gain of each sample of a section (S,): it ends a step in level at the beginning, and fades to 1."""
    length = 0 if rendition is None else rendition.shape[1]
    if rendition is None or not length:
        return np.ones(1, np.float32)
    fade = min(join_samples(sample_rate_hz), before.shape[1])
    same = before[:, before.shape[1] - fade - length : before.shape[1] - fade]
    renditions = _level(same) - _level(rendition)
    beginnings = _level(before[:, -length:]) - _level(own[:, fade : fade + length])
    step = 0.0
    if renditions * beginnings > 0:
        step = math.copysign(min(abs(renditions), abs(beginnings), _MOST_GAIN), renditions)
    elapsed = np.arange(own.shape[1]) / min(_GAIN_S * sample_rate_hz, own.shape[1])
    return np.exp(step * np.clip(1.0 - elapsed, 0.0, 1.0)).astype(np.float32)


def _level(audio: npt.NDArray[np.float32]) -> float:
    """Return the natural logarithm of the audio's root mean square, at least that of -90 dBFS."""
    return 0.5 * math.log(max(float(np.square(audio, dtype=np.float64).mean()), 1e-9))


def encode_section(audio: npt.NDArray[np.float32], sample_rate_hz: int) -> EncodedFile:
    """Return a WAV file with the samples `audio` (C, S) float32."""
    return encode_wav(np.ascontiguousarray(audio.T), sample_rate_hz)


class SectionDecoder:
    """Decodes a file of `encode_section` that arrives in chunks of any size."""

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
