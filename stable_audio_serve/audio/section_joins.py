"""Join each section of a long piece to the audio before it, and keep its loudness and its balance of frequencies.

A model often makes a continuation a little louder, darker or brighter than the audio that it continues. The corrections
here keep the sections of a piece close to the first one.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from stable_audio_serve.audio.keep import FADE_S, fade_ramp
from stable_audio_serve.audio.loudness import describe_clip, measure_loudness
from stable_audio_serve.audio.peaks import treat_peaks
from stable_audio_serve.core.generation import GeneratedSpan
from stable_audio_serve.core.sound import ClipFacts, Peaks

if TYPE_CHECKING:
    import numpy.typing as npt

_MOST_DB = 12.0  # largest gain, in either direction
_RAMP_S = 4.0  # time in which a section's gain and its shelf reach their last values, at most
_RAMP_SHARE = 0.25  # the largest part of a section that this time takes
_LOUDNESS_LU = 1.0  # allowed difference between the loudness of a section and of the section that it should resemble
_WINDOWS_S = (0.25, 0.5, 1.0, 2.0)  # lengths over which the levels before and after a join are compared
_OCTAVES = 0.2  # allowed difference between the spectral centroids of these two sections
_MOST_SHELF_DB = 6.0  # largest gain of the shelf, in either direction
_SHELF_STEPS = 16  # bisections for the gain of the shelf: to 0.0001 dB
_WINDOW = 8192  # samples of a Fourier transform
_TAPS = 4096  # length of the shelf's impulse response, of which only about 10 ms differ from 0


def join_samples(sample_rate_hz: int) -> int:
    """Return the length of the crossfade between two sections, in samples."""
    return round(FADE_S * sample_rate_hz)


def describe_section(audio: npt.NDArray[np.float32], sample_rate_hz: int, *, seed: int) -> ClipFacts:
    """Measure a finished section, `audio` (C, S) float32, including its spectral centroid."""
    powers, frequencies_hz = _measure_spectrum(audio, sample_rate_hz)
    facts = describe_clip(audio, sample_rate_hz, seed=seed)
    return replace(facts, centroid_hz=_centroid_hz(powers, frequencies_hz))


def join_section(
    audio: npt.NDArray[np.float32],
    sample_rate_hz: int,
    *,
    before: npt.NDArray[np.float32],
    num_own: int,
    span: GeneratedSpan | None,
    like: ClipFacts | None,
    peaks: Peaks,
) -> npt.NDArray[np.float32]:
    """Return the audio of a section. It begins with the last 30 ms of `before`, crossfaded with the section.

    `before` (C, S) is the audio that the section continues. `audio` (C, S) float32 begins with `before`, and continues
    with the `num_own` samples of the section. Any samples after these are ignored. `span` is the part of `audio` that
    the model generated, if known. `like` has the measurements of the section that this section should resemble, if any.

    A gain, which changes slowly, removes the step in level at the join, and brings the section within 1 LU of the
    loudness of `like`. If the spectral centroid is more than a fifth of an octave from that of `like`, a shelf of at
    most 6 dB brings it nearer.
    """
    fade, start = min(join_samples(sample_rate_hz), before.shape[1]), before.shape[1]
    own = audio[:, start - fade : start + num_own].copy()
    if span is not None and span.head.shape[1] == fade:
        own[:, :fade] = span.head
    _apply_gain(own, sample_rate_hz, before=before, like=like)
    treated = treat_peaks(own, sample_rate_hz, peaks=peaks)
    # The limiter changes the centroid, so the centroid is measured after it, and the shelf is applied before it.
    if like is not None and _apply_shelf(own, sample_rate_hz, treated=treated, like=like):
        _apply_gain(own, sample_rate_hz, before=before, like=like)
        treated = treat_peaks(own, sample_rate_hz, peaks=peaks)
    end = before[:, start - fade :]
    treated[:, :fade] = end + fade_ramp(fade) * (treated[:, :fade] - end)
    return treated


def _apply_gain(
    own: npt.NDArray[np.float32],
    sample_rate_hz: int,
    *,
    before: npt.NDArray[np.float32],
    like: ClipFacts | None,
) -> None:
    """Change the level of a section (C, S), in place."""
    loudness_lufs = None if like is None else like.loudness_lufs
    first_db, last_db = _find_step(own, sample_rate_hz, before=before), 0.0
    if loudness_lufs is not None and (found := measure_loudness(own, sample_rate_hz)) is not None:
        missing_db = loudness_lufs - found
        last_db = math.copysign(min(max(abs(missing_db) - _LOUDNESS_LU, 0.0), _MOST_DB), missing_db)
    ramp = _make_ramp(own.shape[1], sample_rate_hz)
    own[:, : len(ramp)] *= np.power(10.0, (first_db + (last_db - first_db) * ramp) / 20).astype(np.float32)
    own[:, len(ramp) :] *= np.float32(10 ** (last_db / 20))


def _make_ramp(num_samples: int, sample_rate_hz: int) -> npt.NDArray[np.float64]:
    """Return a ramp from 0 to 1, as long as changes within a section of `num_samples` samples take."""
    length = min(round(_RAMP_S * sample_rate_hz), math.ceil(_RAMP_SHARE * num_samples))
    return np.arange(length) / length


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


def _apply_shelf(
    own: npt.NDArray[np.float32], sample_rate_hz: int, *, treated: npt.NDArray[np.float32], like: ClipFacts
) -> bool:
    """Bring the spectral centroid of a section (C, S) near that of `like`, in place. Return whether it was changed.

    `treated` is the section after the limiter. The shelf changes the level of the frequencies above the centroid of
    `like`. Its phase is 0, so that it can fade in.
    """
    powers, frequencies_hz = _measure_spectrum(treated, sample_rate_hz)
    found_hz, centroid_hz = _centroid_hz(powers, frequencies_hz), like.centroid_hz
    if found_hz is None or centroid_hz is None or abs(octaves := math.log2(found_hz / centroid_hz)) <= _OCTAVES:
        return False
    wanted_hz = centroid_hz * 2 ** math.copysign(_OCTAVES, octaves)
    low_db, high_db = (-_MOST_SHELF_DB, 0.0) if octaves > 0 else (0.0, _MOST_SHELF_DB)
    for _ in range(_SHELF_STEPS):
        gain_db = (low_db + high_db) / 2
        shelf = _shelf(frequencies_hz / centroid_hz, gain_db)
        shelved_hz = _centroid_hz(powers * np.square(shelf), frequencies_hz)
        if shelved_hz is not None and shelved_hz > wanted_hz:
            high_db = gain_db
        else:
            low_db = gain_db
    ratios = np.fft.rfftfreq(_TAPS, centroid_hz / sample_rate_hz).astype(np.float64)
    change = np.fft.irfft(_shelf(ratios, (low_db + high_db) / 2) - 1.0, _TAPS)
    response = np.fft.rfft(np.roll(change, _TAPS // 2), _WINDOW)
    ramp = _make_ramp(own.shape[1], sample_rate_hz)
    padded = np.pad(own, ((0, 0), (_TAPS // 2, _WINDOW)))
    for start in range(0, own.shape[1], _WINDOW - _TAPS):  # overlap-save
        changed = np.fft.irfft(np.fft.rfft(padded[:, start : start + _WINDOW]) * response, _WINDOW)[:, _TAPS:]
        part = own[:, start : start + _WINDOW - _TAPS]
        weights = ramp[start : start + part.shape[1]]
        changed[:, : len(weights)] *= weights
        part += changed[:, : part.shape[1]].astype(np.float32)
    return True


def _shelf(ratios: npt.NDArray[np.float64], gain_db: float) -> npt.NDArray[np.float64]:
    """Return the gains of a high shelf at frequencies, which are given as ratios to the shelf's middle frequency."""
    powers = np.square(ratios)
    return (1 + 10 ** (gain_db / 20) * powers) / (1 + powers)


def _measure_spectrum(
    audio: npt.NDArray[np.float32], sample_rate_hz: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the mean powers of the channels' mean (Welch's method) and their frequencies in Hz."""
    mono = audio.mean(axis=0)
    mono = np.pad(mono, (0, max(_WINDOW - len(mono), 0)))
    window, powers, count = np.hanning(_WINDOW), np.zeros(_WINDOW // 2 + 1), 0
    for start in range(0, len(mono) - _WINDOW + 1, _WINDOW // 2):
        powers += np.square(np.abs(np.fft.rfft(mono[start : start + _WINDOW] * window)))
        count += 1
    return powers / count, np.fft.rfftfreq(_WINDOW, 1 / sample_rate_hz).astype(np.float64)


def _centroid_hz(powers: npt.NDArray[np.float64], frequencies_hz: npt.NDArray[np.float64]) -> float | None:
    """Return the spectral centroid in Hz, None for silence."""
    total, weighted = float(powers.sum()), float((powers * frequencies_hz).sum())
    return weighted / total if weighted > 0 else None
