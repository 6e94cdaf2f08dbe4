"""Make a clip that repeats without a seam.

The model generates the clip and what follows it. The beginning of what follows, the continuation, is crossfaded over
the clip's own beginning. So the last sample of the clip leads, at the next repetition, to the sample that the model
generated after it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from stable_audio_serve.audio.keep import fade_ramp, whole_samples
from stable_audio_serve.core.errors import InvalidRequestError

if TYPE_CHECKING:
    import numpy.typing as npt

    from stable_audio_serve.core.generation import GenerationRequest, LoopStart

LEAST_SURPLUS_S = 0.05  # a loop must be at least this much shorter than the model's longest clip
# Models often let a sound end at the end of a clip. So the model generates more audio than the crossfade needs, and the
# rest is cut off.
_SURPLUS_S = 1.0
_CROSSFADE_S = 0.25
_SHORT_CROSSFADE_S = 0.001
_ATTACK_POWER = 4.0  # a clip begins with an attack if its beginning has this many times the power of the continuation
_LEAD_S = 0.05  # length of the audio that is moved from the end of a loop to before its attack


def with_surplus(request: GenerationRequest, *, max_duration_s: float) -> GenerationRequest:
    """Return the request for a loop, but with the longer duration that the model must generate.

    Planning uses the longer duration. `max_duration_s` is the value in the model's card. Raises InvalidRequestError if
    the loop is too long, because the model must generate more than the loop.
    """
    if request.duration_s > max_duration_s - LEAST_SURPLUS_S:
        allowed = f"at most {max_duration_s - LEAST_SURPLUS_S:g}"
        raise InvalidRequestError(f"duration must be {allowed} for a loop", field="duration", allowed=allowed)
    return replace(request, duration_s=min(request.duration_s + _SURPLUS_S, max_duration_s))


def loop_samples(duration_s: float, sample_rate_hz: int) -> int:
    """Return the number of samples of a loop, rounded down, at least one."""
    return max(1, whole_samples(duration_s, sample_rate_hz))


def close_loop(
    audio: npt.NDArray[np.float32], *, num_samples: int, sample_rate_hz: int, loop: LoopStart
) -> npt.NDArray[np.float32]:
    """Return a loop of `num_samples` samples from a longer clip, `audio` (C, S) float32.

    The crossfade lasts 0.25 s, or half of the loop if that is shorter. If the clip begins with an attack that does not
    come again in the continuation, the crossfade lasts 1 ms to keep the attack. With `loop` "free", the last 50 ms of
    the loop are then moved to its beginning, before the attack.
    """
    longest = min(round(_CROSSFADE_S * sample_rate_hz), num_samples // 2)
    after = audio[:, num_samples : num_samples + longest]
    head = audio[:, : after.shape[1]]
    if _power(head) <= _ATTACK_POWER * _power(after):
        return _join(audio[:, :num_samples], after, correlation=_correlate(head, after))
    after = after[:, : round(_SHORT_CROSSFADE_S * sample_rate_hz)]
    joined = _join(audio[:, :num_samples], after, correlation=0.0)
    lead = min(round(_LEAD_S * sample_rate_hz), num_samples // 2)
    return np.roll(joined, lead, axis=1) if loop == "free" else joined


def repeat_around(audio: npt.NDArray[np.float32], num_samples: int) -> npt.NDArray[np.float32]:
    """Return a loop (C, S) with `num_samples` samples of repetition before it and as many after it."""
    return np.pad(audio, ((0, 0), (num_samples, num_samples)), mode="wrap")


def cut_repeated(
    audio: npt.NDArray[np.float32], num_samples: int, *, length: int | None = None
) -> npt.NDArray[np.float32]:
    """Return the loop (C, S) without the repetitions that `repeat_around` added before an effect was applied.

    The effect has changed the loop and the repetitions in nearly the same way. A linear crossfade with the repetition
    after the loop removes the rest of the difference at the seam. `length` is the length of the loop in samples. After
    resampling it must be given, because rounding may have changed the length by one.
    """
    end = audio.shape[1] - num_samples if length is None else num_samples + length
    after = audio[:, end : end + min(num_samples, (end - num_samples) // 2)]
    return _join(audio[:, num_samples:end], after, correlation=1.0)


def _join(
    clip: npt.NDArray[np.float32], after: npt.NDArray[np.float32], *, correlation: float
) -> npt.NDArray[np.float32]:
    """Return `clip` (C, S) with `after` crossfaded over its beginning.

    The crossfade keeps the power of two sounds whose correlation is `correlation`. At 1, the two gains sum to 1. At 0,
    the squares of the gains sum to 1.
    """
    joined, rise = clip.copy(), fade_ramp(after.shape[1])
    fall = rise[::-1]
    level = np.sqrt(rise**2 + fall**2 + np.float32(2 * correlation) * rise * fall)
    joined[:, : after.shape[1]] = (clip[:, : after.shape[1]] * rise + after * fall) / level
    return joined


def _power(audio: npt.NDArray[np.float32]) -> float:
    return float(np.square(audio, dtype=np.float64).sum())


def _correlate(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> float:
    """Return the correlation of two clips (C, S) over all channels, in 0..1.

    The result is 0 if the correlation is negative or a clip is silent.
    """
    energies = _power(first) * _power(second)
    product = np.multiply(first, second, dtype=np.float64).sum()
    return float(np.clip(product / math.sqrt(energies), 0, 1)) if energies else 0.0
