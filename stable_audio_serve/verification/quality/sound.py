"""Describes a golden clip by its level and magnitude spectrum, and compares two clips."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEAST_COSINE = 0.999  # smallest cosine between the spectra of two clips from the same weights
LEVEL_DB = 0.1  # largest level difference between two clips from the same weights
OTHER_LEVEL_DB = 6.0  # largest level difference between two clips from different weights
SILENCE_DB = -70.0  # dBFS; a clip below this level is silent

_WINDOW_S = 0.046  # rounded so that a window has a power of two of samples: 2048 at 44.1 kHz
_BANDS = 128
_FLOOR = 1e-10  # lowest mean square: -100 dB


@dataclass(frozen=True, slots=True)
class Clip:
    """The description of one golden clip: number of samples, level in dBFS, spectrum (C, T, 128) float16.

    The spectrum has one magnitude per channel, window and band, and a norm of 1. Windows last about 46 ms and overlap
    by half. Bands have equal width; at low sample rates there are fewer. The mean of each channel is removed first, so
    that a constant signal is silent.
    """

    num_samples: int
    level_db: float
    spectrum: npt.NDArray[np.float16]

    @property
    def is_silent(self) -> bool:
        """Whether the level is below `SILENCE_DB`."""
        return self.level_db < SILENCE_DB


def describe(audio: npt.NDArray[np.float32], sample_rate_hz: int) -> Clip:
    """Return the description of `audio` (C, S) float32. Samples must be finite and may exceed -1..1."""
    centred = audio.astype(np.float64)
    centred -= centred.mean(axis=1, keepdims=True)
    level_db = 10 * math.log10(max(float(np.mean(centred**2)), _FLOOR))
    return Clip(audio.shape[1], level_db, _spectrum(centred, window=_window(sample_rate_hz)))


def cosine(one: Clip, other: Clip) -> float:
    """Return the cosine between two spectra: 1 if equal, 0 if the shapes differ or a spectrum is all zeros."""
    if one.spectrum.shape != other.spectrum.shape:
        return 0.0
    first, second = (clip.spectrum.astype(np.float64).ravel() for clip in (one, other))
    norm = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / norm if norm > 0 else 0.0


def difference_from_same(clip: Clip, reference: Clip) -> str | None:
    """Return how a clip differs from an earlier clip of the same weights, or None if it differs little enough."""
    if clip.num_samples != reference.num_samples:
        return f"{clip.num_samples} samples, {reference.num_samples} before"
    likeness, louder_db = cosine(clip, reference), clip.level_db - reference.level_db
    if not likeness >= LEAST_COSINE:
        return f"spectral cosine {likeness:.4f}, must be at least {LEAST_COSINE}"
    if not abs(louder_db) <= LEVEL_DB:
        return f"{louder_db:+.2f} dB, must be within {LEVEL_DB} dB"
    return None


def difference_from_other(clip: Clip, reference: Clip) -> str | None:
    """Return how the levels of two clips of different weights differ, or None if the difference is small enough."""
    louder_db = clip.level_db - reference.level_db
    if not abs(louder_db) <= OTHER_LEVEL_DB:
        return f"{louder_db:+.2f} dB beside the last good weights, must be within {OTHER_LEVEL_DB:g} dB"
    return None


def _window(sample_rate_hz: int) -> int:
    return int(2 ** max(4, round(math.log2(_WINDOW_S * sample_rate_hz))))


def _spectrum(audio: npt.NDArray[np.float64], *, window: int) -> npt.NDArray[np.float16]:
    """Return band magnitudes (C, T, 128) of `audio` (C, S): the square root of each band's power, with norm 1."""
    padded = np.pad(audio, ((0, 0), (0, max(0, window - audio.shape[1]))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window, axis=1)[:, :: window // 2]
    power = np.abs(np.fft.rfft(frames * np.hanning(window), axis=2)[..., 1:]) ** 2
    bands = min(_BANDS, power.shape[2])
    magnitudes = np.sqrt(power.reshape(*power.shape[:2], bands, -1).sum(axis=3))
    return (magnitudes / max(float(np.linalg.norm(magnitudes)), _FLOOR)).astype(np.float16)
