"""Named mixes of requests, and random lists of requests with arrival times.

A list depends only on (mix, rate, count, seed), so every compared server and every later run gets the same list.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.generation import GenerationRequest, Lora, SourceAudio

_ADJECTIVES = ("low", "bright", "soft", "distant", "rough", "slow", "sharp", "warm", "short", "long")
_SOUNDS = (
    "sine tone", "bell", "snare drum", "kick drum", "wind", "rain", "piano chord", "bass note", "siren", "engine",
    "bird song", "organ", "click", "noise burst", "drone", "flute", "guitar string", "cymbal", "sea", "footsteps",
)  # fmt: skip
PROMPTS = tuple(f"a {adjective} {sound}" for adjective, sound in itertools.product(_ADJECTIVES, _SOUNDS))

_NOISE_SHARE = 0.6  # noise level of requests that vary source audio
_ZIPF_EXPONENT = 1.1  # exponent of the Zipf distribution of prompts
_CFG_SCALE = 4.0  # guidance scale of requests with guidance
_GUIDED_FROM = 50  # steps


@dataclass(frozen=True, slots=True)
class Mix:
    """A mix of requests: durations in seconds and numbers of steps, each with its weight. Arrivals are Poisson.

    Each request uses one of `num_adapters` adapters, drawn with equal probability, or none if the number is 0. Each
    duration is varied randomly by the share `spread`, so that few requests have equal lengths.
    """

    name: str
    durations_s: tuple[tuple[float, float], ...]
    steps: tuple[tuple[int, float], ...]
    spread: float = 0.3
    num_adapters: int = 0


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
        Mix("demo-adapters", _DEMO, _EIGHT, num_adapters=8),
    )
}


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a list, which is sent `at_s` seconds after the start of the list.

    Has only fields that all APIs support.
    """

    at_s: float
    prompt: str
    duration_s: float
    seed: int
    steps: int
    cfg_scale: float = 1.0
    adapter: int | None = None


def draw_arrivals(
    mix: Mix | str, *, rate_hz: float | None, count: int, seed: int, max_duration_s: float
) -> tuple[Arrival, ...]:
    """Returns `count` requests of a mix in order of arrival. Longer durations are cut to `max_duration_s`.

    `rate_hz` is the rate of arrivals. If it is None, all requests arrive at once. The rate changes only the arrival
    times. The requests depend only on (mix, count, seed).
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
    (steps,) = rng.choices(*zip(*mix.steps, strict=True))  # (values, weights)
    (duration_s,) = rng.choices(*zip(*mix.durations_s, strict=True))
    duration_s *= rng.uniform(1 - mix.spread, 1 + mix.spread)
    prompt = rng.choices(PROMPTS, [1.0 / rank**_ZIPF_EXPONENT for rank in range(1, len(PROMPTS) + 1)])[0]
    drawn, _ = rng.random(), rng.random()  # drawn for every mix, to get the same lists as earlier versions
    return Arrival(
        at_s=0.0,
        prompt=prompt,
        duration_s=min(duration_s, max_duration_s),
        seed=seed,
        steps=steps,
        cfg_scale=_CFG_SCALE if steps >= _GUIDED_FROM else 1.0,
        adapter=int(drawn * mix.num_adapters) if mix.num_adapters else None,
    )


def to_request(arrival: Arrival, adapters: Sequence[Lora] = ()) -> GenerationRequest:
    """Converts an arrival to a request for an engine. `adapters` are the adapters of the arrival's mix."""
    loras = () if arrival.adapter is None else (adapters[arrival.adapter],)
    own = {name: value for name, value in asdict(arrival).items() if name not in ("at_s", "adapter")}
    return GenerationRequest(**own, loras=loras)


def eight_mixed_requests(card: ModelCard) -> list[GenerationRequest]:
    """Returns requests that differ in length, steps, sampler, guidance, source and mask, scaled to the model."""
    first, second = ("euler", "dpmpp") if "euler" in card.samplers else ("k-heun", "dpmpp-2m-sde")
    level = card.noise_level(_NOISE_SHARE, sampler=None)
    longest_s = min(card.max_duration_s, 30.0)
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, (card.channels, int(longest_s / 4 * card.sample_rate_hz)))
    clip = SourceAudio(noise.astype(np.float32), card.sample_rate_hz)
    fields: Sequence[dict[str, object]] = (
        {"duration_s": longest_s / 16},
        {"duration_s": longest_s / 2, "sampler": first, "steps": 10},
        {"duration_s": longest_s / 4, "cfg_scale": 3.0, "negative_prompt": "noise"},
        {"duration_s": longest_s / 8, "sampler": second, "steps": 16},
        {"duration_s": longest_s / 4, "init_audio": clip, "init_noise_level": level},
        {
            "duration_s": longest_s / 4,
            "inpaint_audio": clip,
            "inpaint_regions_s": ((longest_s / 16, longest_s / 8),),
            "keep": "model",  # other methods are not supported by all compared servers
        },
        {"duration_s": longest_s, "steps": 6},
        {"duration_s": longest_s / 8, "cfg_scale": 5.0, "steps": 12, "sampler": first},
    )
    return [
        GenerationRequest(prompt=PROMPTS[7 * index], seed=index, **{"steps": 8, **field})  # type: ignore[arg-type]
        for index, field in enumerate(fields)
    ]
