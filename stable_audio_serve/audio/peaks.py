"""What happens to a clip that is louder than full scale: a look-ahead limiter, or one of the references' two ways.

The limiter's gain is that of Hämäläinen, "Smoothing of the control signal without clipped output in digital peak
limiters" (DAFx-02): a running maximum of the needed reduction, then an average no longer than that maximum looks ahead,
which therefore never falls below what is needed. Between the two, the reduction decays exponentially. CPU work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stable_audio_serve.core.sound import Peaks

if TYPE_CHECKING:
    import numpy.typing as npt

# Where Stability AI's own decoders limit; leaves 0.2 dB for what lossy encoders add.
CEILING = np.float32(0.977)

_BLOCK = 16  # samples between two points of the gain curve, which is straight from one to the next
_ATTACK_S = 0.005
_HOLD_S = 0.012  # longer than half a period of what can be heard as a tone, so that the gain does not follow its waves
_RELEASE_S = 0.1  # time constant
_LEAST_REDUCTION = 1e-4  # below it there is none: samples far from any peak stay as they are


def treat_peaks(audio: npt.NDArray[np.float32], sample_rate_hz: int, *, peaks: Peaks) -> npt.NDArray[np.float32]:
    """`audio` (C, S) float32 of any loudness, with its peaks treated, in -1..1; it is not changed itself."""
    if peaks == "limit":
        return limit(audio, sample_rate_hz)
    if peaks == "scale":
        return scale(audio)
    return np.clip(audio, np.float32(-1), np.float32(1))


def scale(audio: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """`audio` (C, S) divided by its own peak, louder or quieter; silence stays silence."""
    peak = find_peak(audio)
    return audio / np.float32(peak) if peak else audio


def limit(audio: npt.NDArray[np.float32], sample_rate_hz: int) -> npt.NDArray[np.float32]:
    """`audio` (C, S) with no sample above CEILING: the same array if that is so already, else with one smooth gain for
    all channels."""
    if find_peak(audio) <= CEILING:
        return audio
    num_samples = audio.shape[1]
    needed = _needed_reduction(audio)
    points = _smooth_reduction(needed, points_per_s=sample_rate_hz / _BLOCK)
    ramp = np.arange(_BLOCK, dtype=np.float32) / np.float32(_BLOCK)
    rises = np.diff(points)[:, None]
    reduction = (points[:-1, None] + rises * ramp).reshape(-1)[:num_samples]
    limited = audio * (np.float32(1) - reduction)
    return np.clip(limited, -CEILING, CEILING, out=limited)  # rounding may have lifted a sample by its last bit


def find_peak(audio: npt.NDArray[np.float32]) -> float:
    """The largest absolute sample; 0 where there is none."""
    return float(max(audio.max(initial=0.0), -audio.min(initial=0.0)))


def _needed_reduction(audio: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """1 - gain that each block of samples needs, 0 where it needs none."""
    loudest = np.abs(audio).max(axis=0)
    blocks = np.pad(loudest, (0, -len(loudest) % _BLOCK)).reshape(-1, _BLOCK).max(axis=1).astype(np.float64)
    return 1.0 - float(CEILING) / np.maximum(blocks, float(CEILING))


def _smooth_reduction(needed: npt.NDArray[np.float64], *, points_per_s: float) -> npt.NDArray[np.float32]:
    """The reduction at the edges of the blocks, one more than there are: at none below what a neighbour needs."""
    attack, hold = (max(2, round(seconds * points_per_s)) for seconds in (_ATTACK_S, _HOLD_S))
    padded = np.pad(needed, (hold + attack - 1, attack + 1))
    peaks = np.lib.stride_tricks.sliding_window_view(padded, hold + attack + 1).max(axis=1)
    return np.convolve(_decay(peaks, points_per_s=points_per_s), _window(attack), mode="valid").astype(np.float32)


def _decay(levels: npt.NDArray[np.float64], *, points_per_s: float) -> npt.NDArray[np.float64]:
    """The largest of each level and those before it, each fallen since by a factor e in _RELEASE_S."""
    elapsed = np.arange(len(levels)) / (points_per_s * _RELEASE_S)
    with np.errstate(divide="ignore"):
        decayed = np.exp(np.maximum.accumulate(np.log(levels) + elapsed) - elapsed)
    return np.where(decayed < _LEAST_REDUCTION, 0.0, decayed)


def _window(length: int) -> npt.NDArray[np.float64]:
    """`length` positive weights of a raised cosine with the sum 1."""
    weights = np.hanning(length + 2)[1:-1]
    return weights / weights.sum()
