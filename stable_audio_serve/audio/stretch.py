"""Change the speed of audio without changing its pitch, with the Signalsmith stretch library."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

_BLOCK_S = 0.1
_BLOCKS_OVERLAPPING = 6
_MARGIN_S = 0.25  # silence added before and after the clip, because the library fades both ends
_MAX_FACTOR = 2.0  # largest factor of one pass, because larger factors blur the attacks of sounds


def time_stretch(audio: npt.NDArray[np.float32], sample_rate_hz: int, *, speed: float) -> npt.NDArray[np.float32]:
    """Play `audio` (C, S) float32 `speed` times as fast at the same pitch. Returns (C, round(S / speed)) float32.

    The output has at least one sample unless `audio` is empty. Its peaks may be higher than those of the input. Equal
    inputs give equal outputs. `speed` must be positive and finite.
    """
    samples = max(round(audio.shape[1] / speed), min(audio.shape[1], 1))
    if speed == 1 or not samples:
        return audio[:, :samples]
    margin = math.ceil(_MARGIN_S * sample_rate_hz * max(1.0, speed))
    stretched = np.pad(audio, ((0, 0), (margin, margin)))
    num_passes = math.ceil(abs(math.log(speed, _MAX_FACTOR)) - 1e-9)
    for _ in range(num_passes):
        stretched = _stretch_once(stretched, sample_rate_hz, speed=speed ** (1 / num_passes))
    start = round(margin / speed)
    return stretched[:, start : start + samples]


def _stretch_once(audio: npt.NDArray[np.float32], sample_rate_hz: int, *, speed: float) -> npt.NDArray[np.float32]:
    from python_stretch.Signalsmith import Stretch

    stretch = Stretch(0)  # a fixed random seed
    block = math.ceil(_BLOCK_S * sample_rate_hz)
    stretch.configure(audio.shape[0], block, max(1, block // _BLOCKS_OVERLAPPING))
    stretch.setTimeFactor(speed)
    return np.asarray(stretch.process(np.ascontiguousarray(audio)), np.float32)  # `process` removes the latency
