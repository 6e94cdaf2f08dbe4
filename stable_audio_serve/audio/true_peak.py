"""Measure the true peak of a clip: the largest value of the signal between the samples too (ITU-R BS.1770-4, annex 2).

The signal is interpolated at four times its sample rate.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

_OVERSAMPLING = 4
_REACH = 16  # samples on each side of an interpolated value that it depends on
_KAISER_BETA = 6.0
_FRAME = 32  # positions that are interpolated by one row of a matrix product
_GROUP = 128  # rows of one matrix product; larger ones would start BLAS threads


def measure_true_peak(audio: npt.NDArray[np.float32]) -> float:
    """Return the largest absolute value of the signal `audio` (C, S) float32, 1 = full scale; 0 without samples."""
    return float(envelope(audio).max(initial=0.0))


def envelope(audio: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the largest absolute value of the signal at each sample, over all channels, as (S,) float32.

    The values between two samples count for both samples.
    """
    channels, num_samples = audio.shape
    between = np.zeros(num_samples + 1, np.float32)  # before each sample, and after the last one
    padded = np.pad(audio, ((0, 0), (_REACH, _REACH + -(num_samples + 1) % _FRAME)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FRAME + 2 * _REACH - 1, axis=1)[:, ::_FRAME]
    interpolators = _make_interpolators()
    for channel in range(channels):
        for start in range(0, frames.shape[1], _GROUP):
            group = np.ascontiguousarray(frames[channel, start : start + _GROUP])
            place = between[start * _FRAME : (start + _GROUP) * _FRAME]
            for taps in interpolators:
                values = (group @ taps).reshape(-1)[: len(place)]
                np.maximum(place, np.abs(values, out=values), out=place)
    return np.maximum(np.maximum(between[:-1], between[1:]), np.abs(audio).max(axis=0, initial=0.0))


@cache
def _make_interpolators() -> tuple[npt.NDArray[np.float32], ...]:
    """Return three matrices (_FRAME + 2 _REACH - 1, _FRAME) float32 that map samples to values between them.

    A frame of F + 2R - 1 samples gives a value after each of its samples R - 1 to R + F - 2, with the first matrix a
    quarter of a sample after it, with the others a half and three quarters. The filter is a sinc with a Kaiser window.
    """
    fractions = np.arange(1, _OVERSAMPLING) / _OVERSAMPLING
    distance = np.arange(1 - _REACH, _REACH + 1)[:, None] - fractions  # (2R, 3)
    window = np.i0(_KAISER_BETA * np.sqrt(np.maximum(1 - (distance / _REACH) ** 2, 0))) / np.i0(_KAISER_BETA)
    taps = np.sinc(distance) * window
    taps /= taps.sum(axis=0)
    matrices = np.zeros((_OVERSAMPLING - 1, _FRAME + 2 * _REACH - 1, _FRAME), np.float32)
    for position in range(_FRAME):
        matrices[:, position : position + 2 * _REACH, position] = taps.T
    return tuple(matrices)
