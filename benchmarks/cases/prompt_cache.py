"""How often the text encoder runs while prompts repeat as they do, and whether a cached prompt gives the same audio."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.arrivals import draw_arrivals, to_request
from benchmarks.cases.engine import describe_model, load
from benchmarks.client import send_in_flight, send_one_after_another
from benchmarks.settings import CaseSettings
from stable_audio_serve.core.metrics import NullMetrics
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models.protocol import DiffusionModel

_CLIP_S = 0.25  # only its prompt matters
_IN_FLIGHT = 16
_MISSES, _HITS = "engine_prompt_cache_misses", "engine_prompt_cache_hits"


@dataclass(frozen=True, slots=True)
class PromptSizes:
    """Requests of the list, and how many of its prompts are compared cold and warm."""

    requests: int = 400
    compared: int = 8


class Counters(NullMetrics):
    """Adds up an engine's counters."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()

    def increment(self, name: str, value: float = 1.0, **labels: str) -> None:
        super().increment(name, value, **labels)
        self.totals[name] += int(value)


async def run_prompt_cache_case(
    model: DiffusionModel, settings: CaseSettings, *, sizes: PromptSizes = PromptSizes()
) -> dict[str, Any]:
    """In strict mode. Raises RuntimeError if a warm cache changes audio or was not asked."""
    options = EngineOptions(mode="strict", torch_threads=settings.threads)
    counters = Counters()
    card = model.spec.card
    arrivals = draw_arrivals("demo-fast", rate_hz=None, count=sizes.requests, seed=1, max_duration_s=_CLIP_S)
    requests = [replace(to_request(arrival, card), steps=1) for arrival in arrivals]
    distinct = len({request.prompt for request in requests})
    async with Engine(model, options, metrics=counters) as engine:
        await send_in_flight(engine.generate, requests, num_in_flight=_IN_FLIGHT)
    return {
        "model": describe_model(model),
        "prompts": len(requests),
        "distinct_prompts": distinct,
        "text_encodes": counters.totals[_MISSES],
        "text_encodes_over_distinct_prompts_ratio": counters.totals[_MISSES] / distinct,
        "warm_prompts_with_identical_audio": await _compare_cold_and_warm(model, options, count=sizes.compared),
    }


async def _compare_cold_and_warm(model: DiffusionModel, options: EngineOptions, *, count: int) -> int:
    """Returns how many requests gave the same audio twice, the second time without the text encoder: all of them."""
    counters = Counters()
    card = model.spec.card
    arrivals = draw_arrivals("demo-fast", rate_hz=None, count=50 * count, seed=2, max_duration_s=_CLIP_S)
    unlike = {arrival.prompt: to_request(arrival, card) for arrival in arrivals}
    requests = list(unlike.values())[:count]
    async with Engine(model, options, metrics=counters) as engine:
        cold, _ = await send_one_after_another(engine.generate, requests)
        warm, _ = await send_one_after_another(engine.generate, requests)
    if (counters.totals[_MISSES], counters.totals[_HITS]) != (len(requests), len(requests)):
        raise RuntimeError(f"{len(requests)} prompts twice: the cache counted {dict(counters.totals)}")
    for first, second in zip(cold, warm, strict=True):
        if not np.array_equal(first.audio[0], second.audio[0]):
            raise RuntimeError("audio differs between a cold and a warm prompt cache")
    return len(requests)


async def run_prompt_cache(settings: CaseSettings) -> dict[str, Any]:
    """`run_prompt_cache_case` on the model of these settings."""
    return await run_prompt_cache_case(load(settings), settings)


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """How often the text encoder runs."""
    return [
        {
            "prompts": results["prompts"],
            "text_encodes_over_distinct": results["text_encodes_over_distinct_prompts_ratio"],
            "warm_prompts_with_identical_audio": results["warm_prompts_with_identical_audio"],
        }
    ]
