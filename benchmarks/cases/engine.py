"""Compares eight different requests at once with the same requests one after another, in one process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, get_args

from benchmarks.compare import compare_audio
from benchmarks.figures import worst
from benchmarks.load import send_in_flight
from benchmarks.models import CaseSettings, load
from benchmarks.workload import eight_mixed_requests
from stable_audio_serve.core.generation import GenerationRequest, Mode
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models.protocol import DiffusionModel

_SIDES = {"one_after_another": 1, "together": 8}  # number of requests in flight


async def measure(settings: CaseSettings) -> dict[str, Any]:
    """Measure the engine in the mode of the settings, or in both modes. The results are the worst round of each.

    Raises VoidError if the audio differs between requests at once and one after another.
    """
    model = load(settings)
    modes: tuple[Mode, ...] = (settings.mode,) if settings.mode else get_args(Mode)
    return {mode: await _measure_mode(model, settings, mode=mode) for mode in modes}


async def _measure_mode(model: DiffusionModel, settings: CaseSettings, *, mode: Mode) -> dict[str, Any]:
    """Send the requests one after another (A) and at once (B), in the order A B A B in each round."""
    async with Engine(model, EngineOptions(mode=mode, torch_threads=settings.threads)) as engine:
        requests = eight_mixed_requests(model.spec.card)
        alone = [await engine.generate(request) for request in requests]
        together = await asyncio.gather(*map(engine.generate, requests))
        outputs = compare_audio(alone, together, mode=mode)
        rounds = []
        for _ in range(settings.rounds):
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in _SIDES}
            for name in (*_SIDES, *_SIDES):
                runs[name].append(await _time(engine, requests, num_in_flight=_SIDES[name]))
            rounds.append({name: {key: mean(run[key] for run in own) for key in own[0]} for name, own in runs.items()})

    def ratios(figure: str) -> list[float]:
        return [sides["together"][figure] / sides["one_after_another"][figure] for sides in rounds]

    return {
        **outputs,
        "rounds": rounds,
        **worst("throughput_ratio", ratios("throughput_rps"), larger_is_better=True),
        **worst("cpu_time_ratio", ratios("cpu_s")),
        **worst("mean_latency_ratio", ratios("mean_ms")),
    }


async def _time(engine: Engine, requests: Sequence[GenerationRequest], *, num_in_flight: int) -> dict[str, float]:
    """Returns throughput, processor time and mean latency, which counts from the start of the first request."""
    used_s = time.process_time()
    ended_at = await send_in_flight(engine.generate, requests, num_in_flight=num_in_flight)
    cpu_s = time.process_time() - used_s
    return {"throughput_rps": len(requests) / ended_at[-1], "cpu_s": cpu_s, "mean_ms": 1000.0 * mean(ended_at)}


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """Returns a table with one row for each mode of the engine."""
    return [
        {
            "mode": mode,
            "throughput": figures["throughput_ratio"],
            "processor time": figures["cpu_time_ratio"],
            "mean latency": figures["mean_latency_ratio"],
        }
        for mode, figures in results.items()
    ]
