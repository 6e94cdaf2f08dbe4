"""Brings clips that exceed full scale back into it, with a look-ahead limiter or as one of the two references does.

The limiter's gain follows Hämäläinen, "Smoothing of the control signal without clipped output in digital peak
limiters" (DAFx-02): a running maximum of the needed reduction, then an average no longer than the maximum's look-ahead,
so that the gain never reduces less than needed. Between the two, the reduction decays exponentially. CPU work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stable_audio_serve.audio.keep import fade_ramp
from stable_audio_serve.core.generation import GeneratedSpan
from stable_audio_serve.core.sound import Peaks

if TYPE_CHECKING:
    import numpy.typing as npt

# The ceiling of Stability AI's own decoders; leaves 0.2 dB of headroom for lossy encoders.
CEILING = np.float32(0.977)

_BLOCK = 16  # samples between two points of the piecewise linear gain curve
_ATTACK_S = 0.005
_HOLD_S = 0.012  # longer than half a period above 42 Hz, so that the gain does not follow the waveform of a tone
_RELEASE_S = 0.1  # time constant
_LEAST_REDUCTION = 1e-4  # a smaller reduction counts as none, so that samples far from any peak stay unchanged


def treat_peaks(
    audio: npt.NDArray[np.float32],
    sample_rate_hz: int,
    *,
    peaks: Peaks,
    generated: Sequence[GeneratedSpan] | None = None,
) -> npt.NDArray[np.float32]:
    """Returns `audio` (C, S) float32 of any loudness with its peaks treated, in -1..1. Does not change `audio`.

    If only some spans are `generated`, the limiter changes only those; samples beyond -1..1 are clipped elsewhere.
    """
    if peaks == "limit" and generated is not None:
        return limit_spans(audio, sample_rate_hz, spans=generated)
    if peaks == "limit":
        return limit(audio, sample_rate_hz)
    if peaks == "scale":
        return scale(audio)
    return np.clip(audio, np.float32(-1), np.float32(1))


def scale(audio: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Returns `audio` (C, S) divided by its peak, which may make it louder; silence stays silence."""
    peak = find_peak(audio)
    return audio / np.float32(peak) if peak else audio


def limit(audio: npt.NDArray[np.float32], sample_rate_hz: int) -> npt.NDArray[np.float32]:
    """Returns `audio` (C, S) with no sample above CEILING.

    Returns the same array if no sample exceeds it; otherwise all channels get one smooth gain.
    """
    if find_peak(audio) <= CEILING:
        return audio
    num_samples = audio.shape[1]
    needed = _needed_reduction(audio)
    points = _smooth_reduction(needed, points_per_s=sample_rate_hz / _BLOCK)
    ramp = np.arange(_BLOCK, dtype=np.float32) / np.float32(_BLOCK)
    rises = np.diff(points)[:, None]
    reduction = (points[:-1, None] + rises * ramp).reshape(-1)[:num_samples]
    limited = audio * (np.float32(1) - reduction)
    return np.clip(limited, -CEILING, CEILING, out=limited)  # rounding may have raised a sample by its last bit


def limit_spans(
    audio: npt.NDArray[np.float32], sample_rate_hz: int, *, spans: Sequence[GeneratedSpan]
) -> npt.NDArray[np.float32]:
    """Returns `audio` (C, S), in -1..1, with each span limited separately before it cross-fades with the rest."""
    if find_peak(audio) <= CEILING:
        return audio
    finished = audio.copy()
    for span in spans:
        own = audio[:, span.start : span.stop].copy()
        num_in, fade_out = span.head.shape[1], own.shape[1] - span.tail.shape[1]
        own[:, :num_in], own[:, fade_out:] = span.head, span.tail
        change = limit(own, sample_rate_hz) - own
        change[:, :num_in] *= fade_ramp(num_in)
        change[:, fade_out:] *= fade_ramp(span.tail.shape[1])[::-1]
        finished[:, span.start : span.stop] += change
    return np.clip(finished, np.float32(-1), np.float32(1), out=finished)


def find_peak(audio: npt.NDArray[np.float32]) -> float:
    """Returns the largest absolute sample; 0 if there are no samples."""
    return float(max(audio.max(initial=0.0), -audio.min(initial=0.0)))


def _needed_reduction(audio: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Returns 1 - gain for each block of samples, 0 where no reduction is needed."""
    loudest = np.abs(audio).max(axis=0)
    blocks = np.pad(loudest, (0, -len(loudest) % _BLOCK)).reshape(-1, _BLOCK).max(axis=1).astype(np.float64)
    return 1.0 - float(CEILING) / np.maximum(blocks, float(CEILING))


def _smooth_reduction(needed: npt.NDArray[np.float64], *, points_per_s: float) -> npt.NDArray[np.float32]:
    """Returns the reduction at all block edges, at each edge at least what its adjacent blocks need."""
    attack, hold = (max(2, round(seconds * points_per_s)) for seconds in (_ATTACK_S, _HOLD_S))
    padded = np.pad(needed, (hold + attack - 1, attack + 1))
    peaks = np.lib.stride_tricks.sliding_window_view(padded, hold + attack + 1).max(axis=1)
    return np.convolve(_decay(peaks, points_per_s=points_per_s), _window(attack), mode="valid").astype(np.float32)


def _decay(levels: npt.NDArray[np.float64], *, points_per_s: float) -> npt.NDArray[np.float64]:
    """Returns, for each level, the maximum of it and the earlier ones, which decay by a factor e in _RELEASE_S."""
    elapsed = np.arange(len(levels)) / (points_per_s * _RELEASE_S)
    with np.errstate(divide="ignore"):
        decayed = np.exp(np.maximum.accumulate(np.log(levels) + elapsed) - elapsed)
    return np.where(decayed < _LEAST_REDUCTION, 0.0, decayed)


def _window(length: int) -> npt.NDArray[np.float64]:
    """Returns `length` positive weights of a raised cosine that sum to 1."""
    weights = np.hanning(length + 2)[1:-1]
    return weights / weights.sum()
