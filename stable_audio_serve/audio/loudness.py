"""How loud a finished clip is: its peak, its integrated loudness, and whether it is silent. CPU work."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from stable_audio_serve.audio.peaks import find_peak
from stable_audio_serve.core.sound import ClipFacts

if TYPE_CHECKING:
    import numpy.typing as npt

_SILENCE = 10 ** (-70 / 20)  # -70 dBFS
_LEAST_RATE_HZ = 8000  # below, the standard's filters are no longer what they shall be
_BLOCK_S = 0.4  # what loudness is measured in: of a shorter clip it is not defined


def describe_clip(audio: npt.NDArray[np.float32], sample_rate_hz: int, *, seed: int) -> ClipFacts:
    """What is told of a finished clip, `audio` (C, S) float32 in -1..1."""
    peak = find_peak(audio)
    is_silent = peak < _SILENCE
    loudness = None if is_silent else measure_loudness(audio, sample_rate_hz)
    return ClipFacts(seed=seed, peak=peak, loudness_lufs=loudness, is_silent=is_silent)


def measure_loudness(audio: npt.NDArray[np.float32], sample_rate_hz: int) -> float | None:
    """Integrated loudness (ITU-R BS.1770-4) of `audio` (C, S), mono or stereo, LUFS; None where it is not defined."""
    if sample_rate_hz < _LEAST_RATE_HZ or audio.shape[1] < _BLOCK_S * sample_rate_hz:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):  # of silence, whose loudness is -inf
        loudness = float(_load_meter(sample_rate_hz).integrated_loudness(audio.T.astype(np.float64)))
    return loudness if math.isfinite(loudness) else None


@cache
def _load_meter(sample_rate_hz: int) -> Any:
    """The meter of one rate, with filters that are the standard's own at 48 kHz."""
    import pyloudnorm

    return pyloudnorm.Meter(sample_rate_hz, filter_class="DeMan")


def preload() -> None:
    """Import what measuring needs: the first time takes half a second."""
    import pyloudnorm  # noqa: F401
