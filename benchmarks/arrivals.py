"""When requests come and what each asks for, drawn once from (mix, rate, count, seed) and kept in a file, so that every
side and every later run gets the same list. Knows no model and no dialect.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.workload import MIXES, PROMPTS, Mix, Mode, noise_audio
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.generation import GenerationRequest

Value = TypeVar("Value")

_ZIPF_EXPONENT = 1.1
_CFG_SCALE = 4.0  # of guided requests
_NOISE_SHARE = 0.6  # of variations
_SOURCE_S = (10.0, 60.0)
_SOURCE_RATES_HZ = (44_100, 48_000)
_SOURCE_CONTAINERS = ("WAV", "FLAC", "MP3")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """Audio that a request brings along: white noise of this seed."""

    duration_s: float
    sample_rate_hz: int
    container: str
    seed: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request, due `at_s` seconds after the start, in words that every dialect understands."""

    at_s: float
    prompt: str
    duration_s: float
    seed: int
    steps: int
    cfg_scale: float = 1.0  # above 1: two network rows per step
    mode: Mode = "text-to-audio"
    audio_format: str = "wav"
    source: SourceFile | None = None

    @property
    def is_guided(self) -> bool:
        """Whether a step takes two network rows."""
        return self.cfg_scale != 1.0

    @property
    def region_s(self) -> tuple[float, float]:
        """What an inpainting regenerates: the middle third, [start, end) in seconds."""
        return self.duration_s / 3, 2 * self.duration_s / 3


@dataclass(frozen=True, slots=True)
class ArrivalList:
    """Requests in order of their arrival; `rate_hz` None: all at once."""

    mix: str
    rate_hz: float | None
    seed: int
    max_duration_s: float
    arrivals: tuple[Arrival, ...]

    def __iter__(self) -> Iterator[Arrival]:
        return iter(self.arrivals)

    def __len__(self) -> int:
        return len(self.arrivals)

    @property
    def step_classes(self) -> tuple[int, ...]:
        """The step counts that occur, rising."""
        return tuple(sorted({arrival.steps for arrival in self}))

    def save(self, path: Path) -> None:
        """Write the list as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)) + "\n")

    @staticmethod
    def load(path: Path) -> ArrivalList:
        """Read what `save` wrote."""
        values = json.loads(path.read_text())
        return ArrivalList(**{**values, "arrivals": tuple(map(_read_arrival, values["arrivals"]))})


def draw_arrivals(
    mix: Mix | str, *, rate_hz: float | None, count: int, seed: int, max_duration_s: float
) -> ArrivalList:
    """Returns `count` requests of a mix, durations cut to `max_duration_s`.

    What is asked for depends on (mix, count, seed) only; another rate moves the arrivals alone.
    """
    mix = MIXES[mix] if isinstance(mix, str) else mix
    rng = random.Random(f"{mix.name}/{count}/{seed}")
    asked = [
        _draw_request(mix, rng, seed=seed * 100_000 + index, max_duration_s=max_duration_s) for index in range(count)
    ]
    due_s = _draw_times(mix, rate_hz=rate_hz, count=count, seed=seed)
    arrivals = tuple(replace(arrival, at_s=at_s) for arrival, at_s in zip(asked, due_s, strict=True))
    return ArrivalList(mix.name, rate_hz, seed, max_duration_s, arrivals)


def to_request(arrival: Arrival, card: ModelCard) -> GenerationRequest:
    """Returns the request for an engine of the model with this card."""
    request = GenerationRequest(
        prompt=arrival.prompt,
        duration_s=arrival.duration_s,
        seed=arrival.seed,
        steps=arrival.steps,
        cfg_scale=arrival.cfg_scale,
    )
    if arrival.source is None:
        return request
    source = arrival.source
    audio = noise_audio(
        card.channels, duration_s=source.duration_s, sample_rate_hz=source.sample_rate_hz, seed=source.seed
    )
    if arrival.mode == "variation":
        return replace(request, init_audio=audio, init_noise_level=card.noise_level(_NOISE_SHARE, sampler=None))
    return replace(request, inpaint_audio=audio, inpaint_regions_s=(arrival.region_s,))


def _draw_request(mix: Mix, rng: random.Random, *, seed: int, max_duration_s: float) -> Arrival:
    steps = _choose(rng, mix.steps)
    duration_s = _choose(rng, mix.durations_s) * rng.uniform(1 - mix.spread, 1 + mix.spread)
    prompt = rng.choices(PROMPTS, [1.0 / rank**_ZIPF_EXPONENT for rank in range(1, len(PROMPTS) + 1)])[0]
    mode = _choose(rng, mix.modes)
    source = None
    if mode != "text-to-audio":
        source = SourceFile(
            duration_s=min(rng.uniform(*_SOURCE_S), max_duration_s),
            sample_rate_hz=rng.choice(_SOURCE_RATES_HZ),
            container=rng.choice(_SOURCE_CONTAINERS),
            seed=seed,
        )
    return Arrival(
        at_s=0.0,
        prompt=prompt,
        duration_s=min(duration_s, max_duration_s),
        seed=seed,
        steps=steps,
        cfg_scale=_CFG_SCALE if steps >= mix.guided_from else 1.0,
        mode=mode,
        audio_format=_choose(rng, mix.formats),
        source=source,
    )


def _draw_times(mix: Mix, *, rate_hz: float | None, count: int, seed: int) -> list[float]:
    """Returns rising times in seconds; a mix with pauses has the same mean rate."""
    if rate_hz is None:
        return [0.0] * count
    rng = random.Random(f"poisson/{mix.name}/{count}/{seed}")
    share_on = mix.on_s / (mix.on_s + mix.off_s) if mix.on_s else 1.0
    times, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(1.0) * share_on / rate_hz
        periods, rest = divmod(now, mix.on_s) if mix.on_s else (0.0, now)
        times.append(periods * (mix.on_s + mix.off_s) + rest)
    return times


def _choose(rng: random.Random, weighted: Sequence[tuple[Value, float]]) -> Value:
    return rng.choices([value for value, _ in weighted], [weight for _, weight in weighted])[0]


def _read_arrival(values: dict[str, Any]) -> Arrival:
    source = values.pop("source")
    return Arrival(**values, source=SourceFile(**source) if source else None)
