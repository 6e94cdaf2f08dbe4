"""What arrives: named mixes of requests and arrival times, reproducible from (mix, count, seed). Knows no clock."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.models.protocol import ModelSpec

Value = TypeVar("Value")

_ADJECTIVES = ("low", "bright", "soft", "distant", "rough", "slow", "sharp", "warm", "short", "long")
_SOUNDS = (
    "sine tone", "bell", "snare drum", "kick drum", "wind", "rain", "piano chord", "bass note", "siren", "engine",
    "bird song", "organ", "click", "noise burst", "drone", "flute", "guitar string", "cymbal", "sea", "footsteps",
)  # fmt: skip
PROMPTS = tuple(f"a {adjective} {sound}" for adjective, sound in itertools.product(_ADJECTIVES, _SOUNDS))
_ZIPF_EXPONENT = 1.1
_SPREAD = 0.3  # durations vary by +-30 %, so that exact matches are rare


@dataclass(frozen=True, slots=True)
class Mix:
    """Durations (seconds) and step counts with their weights; steps from `guided_from` on are guided."""

    name: str
    durations_s: tuple[tuple[float, float], ...]
    steps: tuple[tuple[int, float], ...]
    guided_from: int = 50
    spread: float = _SPREAD


_SMALL = ((5.0, 0.5), (30.0, 0.35), (92.0, 0.15))
_MEDIUM = ((5.0, 0.4), (30.0, 0.3), (92.0, 0.2), (290.0, 0.1))
_DEMO = ((1.0, 0.5), (4.0, 0.35), (10.0, 0.15))
_MIXED_STEPS = ((8, 0.7), (50, 0.2), (100, 0.1))

MIXES = {
    mix.name: mix
    for mix in (
        Mix("equal-5s", ((5.0, 1.0),), ((8, 1.0),), spread=0.0),
        Mix("small-8", _SMALL, ((8, 1.0),)),
        Mix("small-mixed", _SMALL, _MIXED_STEPS),
        Mix("medium-8", _MEDIUM, ((8, 1.0),)),
        Mix("medium-mixed", _MEDIUM, _MIXED_STEPS),
        Mix("demo-fast", _DEMO, ((8, 1.0),)),
        Mix("demo-wide", _DEMO, ((8, 0.7), (50, 0.3))),
    )
}


def draw_requests(mix: Mix, spec: ModelSpec, *, count: int, seed: int) -> list[GenerationRequest]:
    """`count` requests of a mix for a model, durations cut to its maximum; the same for the same seed."""
    rng = random.Random(f"{mix.name}/{count}/{seed}")
    weights = [1.0 / rank**_ZIPF_EXPONENT for rank in range(1, len(PROMPTS) + 1)]
    requests = []
    for index in range(count):
        steps = _choose(rng, mix.steps)
        duration_s = _choose(rng, mix.durations_s) * rng.uniform(1 - mix.spread, 1 + mix.spread)
        requests.append(
            GenerationRequest(
                prompt=rng.choices(PROMPTS, weights)[0],
                duration_s=min(duration_s, spec.card.max_duration_s),
                seed=seed * 100_000 + index,
                steps=steps,
                cfg_scale=4.0 if steps >= mix.guided_from else 1.0,
            )
        )
    return requests


def poisson_arrivals(*, rate_hz: float, count: int, seed: int) -> list[float]:
    """Arrival times in seconds from the start, rising."""
    rng = random.Random(f"poisson/{rate_hz}/{count}/{seed}")
    return list(itertools.accumulate(rng.expovariate(rate_hz) for _ in range(count)))


def eight_mixed_requests(spec: ModelSpec) -> list[GenerationRequest]:
    """Eight requests that differ in length, steps, sampler, guidance, source and mask, scaled to the model."""
    first, second = ("euler", "dpmpp") if "euler" in spec.card.samplers else ("k-heun", "dpmpp-2m-sde")
    level = spec.card.noise_level(0.6, sampler=None)
    longest_s = min(spec.card.max_duration_s, 30.0)
    clip = _noise_clip(spec, duration_s=longest_s / 4)
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
        },
        {"duration_s": longest_s, "steps": 6},
        {"duration_s": longest_s / 8, "cfg_scale": 5.0, "steps": 12, "sampler": first},
    )
    return [
        GenerationRequest(prompt=PROMPTS[7 * index], seed=index, **{"steps": 8, **field})  # type: ignore[arg-type]
        for index, field in enumerate(fields)
    ]


def _noise_clip(spec: ModelSpec, *, duration_s: float) -> SourceAudio:
    shape = (spec.card.channels, int(duration_s * spec.card.sample_rate_hz))
    samples = np.random.default_rng(0).uniform(-0.3, 0.3, shape)
    return SourceAudio(samples.astype(np.float32), spec.card.sample_rate_hz)


def _choose(rng: random.Random, weighted: Sequence[tuple[Value, float]]) -> Value:
    return rng.choices([value for value, _ in weighted], [weight for _, weight in weighted])[0]
