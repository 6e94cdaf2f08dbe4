"""How loud a finished clip is: its peak, its integrated loudness, and whether it is silent. CPU work.

Loudness is that of ITU-R BS.1770-4, for any sample rate: its two filters as De Man derived them from analogue ones
("Evaluation of implementations of the EBU R128 loudness measurement", AES 145), which give the standard's own
coefficients at 48 kHz. It is written out here because whoever waits for a clip waits for this too: 5 ms per 10 s of
stereo, a third of what pyloudnorm takes.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from stable_audio_serve.audio.peaks import find_peak
from stable_audio_serve.core.sound import ClipFacts

if TYPE_CHECKING:
    import numpy.typing as npt

_SILENCE = 10 ** (-70 / 20)  # -70 dBFS
_LEAST_RATE_HZ = 8000  # below, the filters are no longer what they shall be
_HOP_S = 0.1
_HOPS = 4  # of a block, 0.4 s: of a shorter clip loudness is not defined
_OFFSET_LUFS = -0.691
_ABSOLUTE_GATE_LUFS = -70.0
_RELATIVE_GATE_LU = -10.0


def describe_clip(audio: npt.NDArray[np.float32], sample_rate_hz: int, *, seed: int) -> ClipFacts:
    """What is told of a finished clip, `audio` (C, S) float32 in -1..1."""
    peak = find_peak(audio)
    is_silent = peak < _SILENCE
    loudness = None if is_silent else measure_loudness(audio, sample_rate_hz)
    return ClipFacts(seed=seed, peak=peak, loudness_lufs=loudness, is_silent=is_silent)


def measure_loudness(audio: npt.NDArray[np.float32], sample_rate_hz: int) -> float | None:
    """Integrated loudness of `audio` (C, S), mono or stereo, LUFS; None where it is not defined."""
    if sample_rate_hz < _LEAST_RATE_HZ:
        return None
    from scipy.signal import sosfilt

    hop = round(_HOP_S * sample_rate_hz)
    num_hops = audio.shape[1] // hop
    if num_hops < _HOPS:
        return None
    weighted = sosfilt(k_weighting(sample_rate_hz), audio[:, : num_hops * hop])
    hops = np.square(weighted).reshape(len(audio), num_hops, hop).sum(axis=(0, 2), dtype=np.float64)
    powers = np.convolve(hops, np.ones(_HOPS), mode="valid") / (_HOPS * hop)
    gate = _power(_ABSOLUTE_GATE_LUFS)
    if not (powers > gate).any():
        return None
    gate = max(gate, powers[powers > gate].mean() * 10 ** (_RELATIVE_GATE_LU / 10))
    return _OFFSET_LUFS + 10 * math.log10(powers[powers > gate].mean())


@cache
def k_weighting(sample_rate_hz: int) -> npt.NDArray[np.float64]:
    """The high shelf and the high pass of the standard as second-order sections (2, 6)."""
    k = math.tan(math.pi * 1681.974450955533 / sample_rate_hz)
    q, high = 0.7071752369554196, 10 ** (3.999843853973347 / 20)
    band = high**0.4996667741545416
    a0 = 1 + k / q + k * k
    shelf = [(high + band * k / q + k * k) / a0, 2 * (k * k - high) / a0, (high - band * k / q + k * k) / a0]
    shelf += [1.0, 2 * (k * k - 1) / a0, (1 - k / q + k * k) / a0]
    k = math.tan(math.pi * 38.13547087602444 / sample_rate_hz)
    q = 0.5003270373238773
    a0 = 1 + k / q + k * k
    high_pass = [1.0, -2.0, 1.0, 1.0, 2 * (k * k - 1) / a0, (1 - k / q + k * k) / a0]
    return np.array([shelf, high_pass])


def preload() -> None:
    """Import what measuring needs: the first time takes half a second."""
    import scipy.signal  # noqa: F401


def _power(lufs: float) -> float:
    return float(10 ** ((lufs - _OFFSET_LUFS) / 10))
