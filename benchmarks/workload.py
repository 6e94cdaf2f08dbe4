"""Named mixes of requests, and random lists of requests with arrival times.

A list depends only on (mix, rate, count, seed), so every compared server and every later run gets the same list.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from stable_audio_serve.core.generation import GenerationRequest

Value = TypeVar("Value")

_ADJECTIVES = ("low", "bright", "soft", "distant", "rough", "slow", "sharp", "warm", "short", "long")
_SOUNDS = (
    "sine tone", "bell", "snare drum", "kick drum", "wind", "rain", "piano chord", "bass note", "siren", "engine",
    "bird song", "organ", "click", "noise burst", "drone", "flute", "guitar string", "cymbal", "sea", "footsteps",
)  # fmt: skip
PROMPTS = tuple(f"a {adjective} {sound}" for adjective, sound in itertools.product(_ADJECTIVES, _SOUNDS))

_ZIPF_EXPONENT = 1.1  # exponent of the Zipf distribution of prompts
_CFG_SCALE = 4.0  # guidance scale of requests with guidance
_GUIDED_FROM = 50  # steps


@dataclass(frozen=True, slots=True)
class Mix:
    """A mix of requests: durations in seconds and numbers of steps, each with its weight. Arrivals are Poisson.

    Each duration is varied randomly by the share `spread`, so that few requests have equal lengths.
    """

    name: str
    durations_s: tuple[tuple[float, float], ...]
    steps: tuple[tuple[int, float], ...]
    spread: float = 0.3


_SMALL = ((5.0, 0.5), (30.0, 0.35), (92.0, 0.15))
_MEDIUM = ((5.0, 0.4), (30.0, 0.3), (92.0, 0.2), (290.0, 0.1))
_DEMO = ((1.0, 0.5), (4.0, 0.35), (10.0, 0.15))
_EIGHT = ((8, 1.0),)
_MIXED_STEPS = ((8, 0.7), (50, 0.2), (100, 0.1))

MIXES = {
    mix.name: mix
    for mix in (
        Mix("equal-5s", ((5.0, 1.0),), _EIGHT, spread=0.0),
        Mix("small-8", _SMALL, _EIGHT),
        Mix("small-mixed", _SMALL, _MIXED_STEPS),
        Mix("medium-8", _MEDIUM, _EIGHT),
        Mix("medium-mixed", _MEDIUM, _MIXED_STEPS),
        Mix("sao-100", ((47.0, 1.0),), ((100, 1.0),), spread=0.0),
        Mix("demo-fast", _DEMO, _EIGHT),
        Mix("demo-wide", _DEMO, ((8, 0.7), (50, 0.3))),
    )
}


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request that is sent `at_s` seconds after the start of its list. Has only fields that all APIs support."""

    at_s: float
    prompt: str
    duration_s: float
    seed: int
    steps: int
    cfg_scale: float = 1.0

    @property
    def is_guided(self) -> bool:
        """Whether the request uses guidance, so that a step needs two rows of the network."""
        return self.cfg_scale != 1.0


def draw_arrivals(
    mix: Mix | str, *, rate_hz: float | None, count: int, seed: int, max_duration_s: float
) -> tuple[Arrival, ...]:
    """Returns `count` requests of a mix in order of arrival. Longer durations are cut to `max_duration_s`.

    `rate_hz` is the rate of arrivals; if it is None, all requests arrive at once. The rate changes only the arrival
    times: the requests depend only on (mix, count, seed).
    """
    mix = MIXES[mix] if isinstance(mix, str) else mix
    rng = random.Random(f"{mix.name}/{count}/{seed}")
    asked = [
        _draw_request(mix, rng, seed=seed * 100_000 + index, max_duration_s=max_duration_s) for index in range(count)
    ]
    due_s = [0.0] * count
    if rate_hz is not None:
        clock = random.Random(f"poisson/{mix.name}/{count}/{seed}")
        due_s = list(itertools.accumulate(clock.expovariate(1.0) / rate_hz for _ in range(count)))
    return tuple(replace(arrival, at_s=at_s) for arrival, at_s in zip(asked, due_s, strict=True))


def _draw_request(mix: Mix, rng: random.Random, *, seed: int, max_duration_s: float) -> Arrival:
    steps = _choose(rng, mix.steps)
    duration_s = _choose(rng, mix.durations_s) * rng.uniform(1 - mix.spread, 1 + mix.spread)
    prompt = rng.choices(PROMPTS, [1.0 / rank**_ZIPF_EXPONENT for rank in range(1, len(PROMPTS) + 1)])[0]
    rng.random(), rng.random()  # not used, but needed to get the same lists as earlier versions
    return Arrival(
        at_s=0.0,
        prompt=prompt,
        duration_s=min(duration_s, max_duration_s),
        seed=seed,
        steps=steps,
        cfg_scale=_CFG_SCALE if steps >= _GUIDED_FROM else 1.0,
    )


def _choose(rng: random.Random, weighted: Sequence[tuple[Value, float]]) -> Value:
    return rng.choices([value for value, _ in weighted], [weight for _, weight in weighted])[0]


def to_request(arrival: Arrival) -> GenerationRequest:
    """Returns the request in the form that an engine accepts."""
    return GenerationRequest(
        prompt=arrival.prompt,
        duration_s=arrival.duration_s,
        seed=arrival.seed,
        steps=arrival.steps,
        cfg_scale=arrival.cfg_scale,
    )
