"""Bring a clip to a target loudness, with a limiter for its true peaks, and fade its ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stable_audio_serve.audio.keep import fade_ramp
from stable_audio_serve.audio.loudness import describe_clip, measure_loudness
from stable_audio_serve.audio.peaks import LIMITED_AROUND_S, limit
from stable_audio_serve.audio.seams import cut_repeated, repeat_around
from stable_audio_serve.audio.true_peak import envelope, measure_true_peak
from stable_audio_serve.core.sound import Finishing, Loudness

if TYPE_CHECKING:
    import numpy.typing as npt

# The limiter lowers the loudness, so the gain is raised until the target is reached, but not by more than this: the
# limiter would distort a clip whose peaks are far above its loudness.
_MOST_EXTRA_GAIN_DB = 12.0
MOST_PASSES = 8
_CLOSE_LU = 0.05
_LEAST_SLOPE = 0.1  # LU per dB; a smaller slope is not trusted


def to_loudness(
    audio: npt.NDArray[np.float32], sample_rate_hz: int, *, loudness: Loudness, is_loop: bool
) -> npt.NDArray[np.float32] | None:
    """Bring `audio` (C, S) float32 to the target loudness, as far as its true peaks allow, and return the result.

    `audio` may have any level. Returns None if the audio is silent or its loudness is undefined, because no gain can be
    computed then.
    """
    measured = describe_clip(audio, sample_rate_hz, seed=0).loudness_lufs
    if measured is None:
        return None
    around = round(LIMITED_AROUND_S * sample_rate_hz) if is_loop else 0
    repeated = repeat_around(audio, around) if is_loop else audio
    levels, ceiling = envelope(repeated), to_gain(loudness.true_peak_dbtp)
    gain_db: float | None = loudness.target_lufs - measured
    tried: list[tuple[float, float]] = []
    while gain_db is not None and len(tried) < MOST_PASSES:
        gain = np.float32(to_gain(gain_db))
        limited = limit(repeated * gain, sample_rate_hz, ceiling=ceiling, levels=levels * gain)
        limited = cut_repeated(limited, around) if is_loop else limited
        reached = measure_loudness(limited, sample_rate_hz)
        tried.append((gain_db, loudness.target_lufs if reached is None else reached))
        gain_db = next_gain_db(tried, target_lufs=loudness.target_lufs)
    # The changing gain may have raised the signal between two samples a little.
    limited *= np.float32(min(1.0, ceiling / measure_true_peak(limited)))
    return limited


def next_gain_db(tried: Sequence[tuple[float, float]], *, target_lufs: float) -> float | None:
    """Return the gain in dB to try next, or None if the last one is good enough.

    `tried` are the gains in dB that were tried, each with the loudness in LUFS that was reached. The limiter makes the
    loudness rise by less than the gain, so the last two entries tell how much gain the rest needs.
    """
    gain_db, reached = tried[-1]
    missing, slope = target_lufs - reached, 1.0
    if len(tried) > 1:
        before_db, before = tried[-2]
        slope = max((reached - before) / (gain_db - before_db), _LEAST_SLOPE)
    next_db = min(gain_db + missing / slope, tried[0][0] + _MOST_EXTRA_GAIN_DB)
    return None if abs(missing) <= _CLOSE_LU or abs(next_db - gain_db) < _CLOSE_LU else next_db


def fade(
    audio: npt.NDArray[np.float32],
    sample_rate_hz: int,
    *,
    finishing: Finishing,
    start: int = 0,
    num_samples: int | None = None,
) -> npt.NDArray[np.float32]:
    """Return `audio` (C, S), which begins at the sample `start` of a clip, with the linear fades of the clip's ends.

    `num_samples` is the length of the clip; by default, the clip ends where `audio` ends.
    """
    length = audio.shape[1]
    whole = start + length if num_samples is None else num_samples
    num_in, num_out = (
        min(round(fade_s * sample_rate_hz), whole) for fade_s in (finishing.fade_in_s, finishing.fade_out_s)
    )
    after = whole - start - length
    in_first, in_last = (min(max(num - before, 0), length) for num, before in ((num_in, start), (num_out, after)))
    if not (in_first or in_last):
        return audio
    faded = audio.copy()
    faded[:, :in_first] *= fade_ramp(num_in, first=start, count=in_first)
    faded[:, length - in_last :] *= fade_ramp(num_out, first=after, count=in_last)[::-1]
    return faded


def to_dbtp(peak: float) -> float | None:
    """Return a true peak in dBTP, None for 0."""
    return 20 * float(np.log10(peak)) if peak else None


def to_gain(level_db: float) -> float:
    """Return the factor of a level in decibels."""
    return float(10 ** (level_db / 20))
