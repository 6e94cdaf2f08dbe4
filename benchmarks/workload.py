"""What is asked for: named mixes of requests, and a fixed set of eight unlike ones. Knows no clock and no model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.generation import GenerationRequest, SourceAudio

_ADJECTIVES = ("low", "bright", "soft", "distant", "rough", "slow", "sharp", "warm", "short", "long")
_SOUNDS = (
    "sine tone", "bell", "snare drum", "kick drum", "wind", "rain", "piano chord", "bass note", "siren", "engine",
    "bird song", "organ", "click", "noise burst", "drone", "flute", "guitar string", "cymbal", "sea", "footsteps",
)  # fmt: skip
PROMPTS = tuple(f"a {adjective} {sound}" for adjective, sound in itertools.product(_ADJECTIVES, _SOUNDS))
_SPREAD = 0.3  # durations vary by +-30 %, so that exact matches are rare

Mode = Literal["text-to-audio", "variation", "inpaint"]


@dataclass(frozen=True, slots=True)
class Mix:
    """Values with their weights: durations in seconds, step counts (guided from `guided_from` on), modes and formats.

    Arrivals are Poisson at the rate asked for, or come in bursts: `on_s` seconds at a higher rate, `off_s` at none.
    """

    name: str
    durations_s: tuple[tuple[float, float], ...]
    steps: tuple[tuple[int, float], ...]
    guided_from: int = 50
    spread: float = _SPREAD
    modes: tuple[tuple[Mode, float], ...] = (("text-to-audio", 1.0),)
    formats: tuple[tuple[str, float], ...] = (("wav", 1.0),)
    on_s: float = 0.0
    off_s: float = 0.0


_SMALL = ((5.0, 0.5), (30.0, 0.35), (92.0, 0.15))
_MEDIUM = ((5.0, 0.4), (30.0, 0.3), (92.0, 0.2), (290.0, 0.1))
_DEMO = ((1.0, 0.5), (4.0, 0.35), (10.0, 0.15))
_EIGHT = ((8, 1.0),)
_MIXED_STEPS = ((8, 0.7), (50, 0.2), (100, 0.1))
_FORMATS = (("wav", 0.4), ("flac", 0.2), ("mp3", 0.3), ("opus", 0.1))

MIXES = {
    mix.name: mix
    for mix in (
        Mix("equal-5s", ((5.0, 1.0),), _EIGHT, spread=0.0),
        Mix("small-8", _SMALL, _EIGHT),
        Mix("small-mixed", _SMALL, _MIXED_STEPS),
        Mix("medium-8", _MEDIUM, _EIGHT),
        Mix("medium-mixed", _MEDIUM, _MIXED_STEPS),
        Mix("sao-100", ((47.0, 1.0),), ((100, 1.0),), spread=0.0),
        Mix("edit", _SMALL, _EIGHT, modes=(("text-to-audio", 0.5), ("variation", 0.25), ("inpaint", 0.25))),
        Mix("formats", _SMALL, _EIGHT, formats=_FORMATS),
        Mix("bursty", _SMALL, _MIXED_STEPS, on_s=5.0, off_s=10.0),
        Mix("overload", _SMALL, _EIGHT),
        Mix("demo-fast", _DEMO, _EIGHT),
        Mix("demo-wide", _DEMO, ((8, 0.7), (50, 0.3))),
    )
}


def eight_mixed_requests(card: ModelCard) -> list[GenerationRequest]:
    """Eight requests that differ in length, steps, sampler, guidance, source and mask, scaled to the model."""
    first, second = ("euler", "dpmpp") if "euler" in card.samplers else ("k-heun", "dpmpp-2m-sde")
    level = card.noise_level(0.6, sampler=None)
    longest_s = min(card.max_duration_s, 30.0)
    clip = noise_audio(card.channels, duration_s=longest_s / 4, sample_rate_hz=card.sample_rate_hz)
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
            "keep": "model",  # the sides that are compared by their audio know nothing else
        },
        {"duration_s": longest_s, "steps": 6},
        {"duration_s": longest_s / 8, "cfg_scale": 5.0, "steps": 12, "sampler": first},
    )
    return [
        GenerationRequest(prompt=PROMPTS[7 * index], seed=index, **{"steps": 8, **field})  # type: ignore[arg-type]
        for index, field in enumerate(fields)
    ]


def noise_audio(channels: int, *, duration_s: float, sample_rate_hz: int, seed: int = 0) -> SourceAudio:
    """Returns white noise (channels, S) to edit; the same for the same arguments."""
    shape = (channels, int(duration_s * sample_rate_hz))
    samples = np.random.default_rng(seed).uniform(-0.3, 0.3, shape)
    return SourceAudio(samples.astype(np.float32), sample_rate_hz)
