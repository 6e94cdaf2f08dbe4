"""Bring clips that exceed full scale into -1..1: with a look-ahead limiter, by scaling, or by clipping.

The limiter follows Hämäläinen, "Smoothing of the control signal without clipped output in digital peak limiters"
(DAFx-02). It takes the running maximum of the needed gain reduction, lets this maximum decay exponentially, and then
smooths it with a moving average. The average is not longer than the look-ahead of the maximum, so the reduction is
never smaller than needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stable_audio_serve.audio.keep import fade_ramp
from stable_audio_serve.audio.seams import cut_repeated, repeat_around
from stable_audio_serve.core.generation import GeneratedSpan
from stable_audio_serve.core.sound import Peaks

if TYPE_CHECKING:
    import numpy.typing as npt

# The largest sample of a limited clip. Stability AI's decoders use the same value. It leaves 0.2 dB below full scale,
# because lossy encoders raise peaks.
CEILING = float(np.float32(0.977))

BLOCK = 16  # samples between two points of the piecewise linear gain curve
_ATTACK_S = 0.005
_HOLD_S = 0.012  # half a period of 42 Hz, so that the gain does not follow the waveform of higher tones
_RELEASE_S = 0.1  # time in which the reduction decays by a factor e
LIMITED_AROUND_S = 1.0  # a loop is limited with this much repetition on both sides; any reduction decays in this time
_LEAST_REDUCTION = 1e-4  # smaller reductions are set to 0, so that samples far from any peak stay unchanged


def treat_peaks(
    audio: npt.NDArray[np.float32],
    sample_rate_hz: int,
    *,
    peaks: Peaks,
    generated: Sequence[GeneratedSpan] | None = None,
    is_loop: bool = False,
) -> npt.NDArray[np.float32]:
    """Return `audio` (C, S) float32 with its peaks brought into -1..1. `audio` may have any level and is not changed.

    If `generated` parts of the clip are given, the limiter changes only these parts. Elsewhere, samples beyond -1..1
    are clipped. A clip that repeats without a seam (`is_loop`) still does so afterwards.
    """
    if peaks == "limit" and is_loop:
        return limit_loop(audio, sample_rate_hz)
    if peaks == "limit" and generated is not None:
        return limit_spans(audio, sample_rate_hz, spans=generated)
    if peaks == "limit":
        return limit(audio, sample_rate_hz)
    if peaks == "scale":
        return scale(audio)
    return np.clip(audio, np.float32(-1), np.float32(1))


def scale(audio: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return `audio` (C, S) divided by its peak. Quiet audio becomes louder, and silence stays silence."""
    peak = find_peak(audio)
    return audio / np.float32(peak) if peak else audio


def limit(
    audio: npt.NDArray[np.float32],
    sample_rate_hz: int,
    *,
    ceiling: float = CEILING,
    levels: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float32]:
    """Return `audio` (C, S) with no sample above `ceiling`. All channels get the same smooth gain.

    `levels` (S,) are the values that the limiter keeps below the ceiling. By default, each is the largest absolute
    sample of all channels. Returns `audio` itself if no level exceeds the ceiling.
    """
    if (find_peak(audio) if levels is None else levels.max(initial=0.0)) <= ceiling:
        return audio
    levels = np.abs(audio).max(axis=0) if levels is None else levels
    num_samples = audio.shape[1]
    needed = _needed_reduction(levels, ceiling)
    points = _smooth_reduction(needed, points_per_s=sample_rate_hz / BLOCK)
    ramp = np.arange(BLOCK, dtype=np.float32) / np.float32(BLOCK)
    rises = np.diff(points)[:, None]
    reduction = (points[:-1, None] + rises * ramp).reshape(-1)[:num_samples]
    limited = audio * (np.float32(1) - reduction)
    return np.clip(limited, -ceiling, ceiling, out=limited)  # rounding may have raised a sample by its last bit


def limit_loop(audio: npt.NDArray[np.float32], sample_rate_hz: int) -> npt.NDArray[np.float32]:
    """Return a loop, `audio` (C, S), with no sample above CEILING. The result still repeats without a seam."""
    if find_peak(audio) <= CEILING:
        return audio
    around = round(LIMITED_AROUND_S * sample_rate_hz)
    limited = cut_repeated(limit(repeat_around(audio, around), sample_rate_hz), around)
    return np.clip(limited, -CEILING, CEILING, out=limited)


def limit_spans(
    audio: npt.NDArray[np.float32], sample_rate_hz: int, *, spans: Sequence[GeneratedSpan]
) -> npt.NDArray[np.float32]:
    """Return `audio` (C, S) with each span limited separately, and all other samples clipped to -1..1.

    At its ends, `audio` contains a crossfade of each span with the source. The limiter gets the span without these
    crossfades. The difference that the limiter makes is then faded in and out in the same way, and added to `audio`.
    """
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
    """Return the largest absolute sample, 0 if there are no samples."""
    return abs(float(max(audio.max(initial=0.0), -audio.min(initial=0.0))))  # not -0


def _needed_reduction(levels: npt.NDArray[np.float32], ceiling: float) -> npt.NDArray[np.float64]:
    """Return the reduction (1 - gain) that each block of samples needs to stay below `ceiling`, 0 if none."""
    blocks = np.pad(levels, (0, -len(levels) % BLOCK)).reshape(-1, BLOCK).max(axis=1).astype(np.float64)
    return 1.0 - ceiling / np.maximum(blocks, ceiling)


def _smooth_reduction(needed: npt.NDArray[np.float64], *, points_per_s: float) -> npt.NDArray[np.float32]:
    """Return a smooth reduction at each edge between blocks, never smaller than the blocks on both sides need."""
    attack, hold = (max(2, round(seconds * points_per_s)) for seconds in (_ATTACK_S, _HOLD_S))
    padded = np.pad(needed, (hold + attack - 1, attack + 1))
    peaks = np.lib.stride_tricks.sliding_window_view(padded, hold + attack + 1).max(axis=1)
    return np.convolve(_decay(peaks, points_per_s=points_per_s), _window(attack), mode="valid").astype(np.float32)


def _decay(levels: npt.NDArray[np.float64], *, points_per_s: float) -> npt.NDArray[np.float64]:
    """Return for each level the maximum of itself and all earlier levels, which decay by a factor e in _RELEASE_S."""
    elapsed = np.arange(len(levels)) / (points_per_s * _RELEASE_S)
    with np.errstate(divide="ignore"):
        decayed = np.exp(np.maximum.accumulate(np.log(levels) + elapsed) - elapsed)
    return np.where(decayed < _LEAST_REDUCTION, 0.0, decayed)


def _window(length: int) -> npt.NDArray[np.float64]:
    """Return `length` positive weights that sum to 1, shaped as a raised cosine."""
    weights = np.hanning(length + 2)[1:-1]
    return weights / weights.sum()
