"""Bring a clip to a target loudness, with a limiter for its true peaks, and fade its ends."""

from __future__ import annotations

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
MOST_EXTRA_GAIN_DB = 12.0
_MOST_PASSES = 8
CLOSE_LU = 0.05


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
    first_db = gain_db = loudness.target_lufs - measured
    for _ in range(_MOST_PASSES):
        gain = np.float32(to_gain(gain_db))
        limited = limit(repeated * gain, sample_rate_hz, ceiling=ceiling, levels=levels * gain)
        limited = cut_repeated(limited, around) if is_loop else limited
        reached = measure_loudness(limited, sample_rate_hz)
        missing_db = 0.0 if reached is None else loudness.target_lufs - reached
        next_db = min(gain_db + missing_db, first_db + MOST_EXTRA_GAIN_DB)
        if abs(missing_db) <= CLOSE_LU or next_db - gain_db < CLOSE_LU:
            break
        gain_db = next_db
    # The changing gain may have raised the signal between two samples a little.
    limited *= np.float32(min(1.0, ceiling / measure_true_peak(limited)))
    return limited


def fade(audio: npt.NDArray[np.float32], sample_rate_hz: int, *, finishing: Finishing) -> npt.NDArray[np.float32]:
    """Return `audio` (C, S) with linear fades at its ends."""
    if not (finishing.fade_in_s or finishing.fade_out_s):
        return audio
    faded = audio.copy()
    num_in, num_out = (
        min(round(fade_s * sample_rate_hz), audio.shape[1]) for fade_s in (finishing.fade_in_s, finishing.fade_out_s)
    )
    faded[:, :num_in] *= fade_ramp(num_in)
    faded[:, audio.shape[1] - num_out :] *= fade_ramp(num_out)[::-1]
    return faded


def true_peak_dbtp(audio: npt.NDArray[np.float32]) -> float | None:
    """Return the true peak of `audio` (C, S) in dBTP, None if all samples are 0."""
    return to_dbtp(measure_true_peak(audio))


def to_dbtp(peak: float) -> float | None:
    """Return a true peak in dBTP, None for 0."""
    return 20 * float(np.log10(peak)) if peak else None


def to_gain(level_db: float) -> float:
    """Return the factor of a level in decibels."""
    return float(10 ** (level_db / 20))
