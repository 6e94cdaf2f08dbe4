"""Measure the true peak of a clip: the largest value of the signal at and between its samples.

ITU-R BS.1770-4, annex 2, defines the true peak.
The signal is interpolated at four times its sample rate.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

_OVERSAMPLING = 4
_REACH = 16  # an interpolated value depends on this many samples on each side
_KAISER_BETA = 6.0
_FRAME = 32  # positions that are interpolated by one row of a matrix product
_GROUP = 128  # rows of one matrix product; larger ones would start BLAS threads


def measure_true_peak(audio: npt.NDArray[np.float32]) -> float:
    """Return the true peak of `audio` (C, S) float32, where 1 is full scale. It is 0 if there are no samples."""
    return float(envelope(audio).max(initial=0.0))


def envelope(audio: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return, for each sample of `audio`, the largest absolute value of the signal at and beside it, as (S,) float32.

    A value between two samples counts for both samples. The result is the largest value of all channels.
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

    Let F be _FRAME and R be _REACH. A frame of F + 2R - 1 samples gives one value after each of its samples R - 1 to
    R + F - 2. The first matrix gives the values a quarter of a sample later, the second a half, and the third three
    quarters. The filter is a sinc with a Kaiser window.
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
