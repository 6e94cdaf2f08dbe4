"""Measures the time for one 10 s clip in three ways: the bare pipeline, the engine, and the whole server over HTTP."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.compare import compare_audio
from benchmarks.figures import summarize, worst
from benchmarks.load import describe_quiet, in_quiet, play
from benchmarks.models import CaseSettings, load, resolve_model
from benchmarks.servers.process import serving
from benchmarks.sides.servers import open_side
from benchmarks.workload import Arrival, to_request
from stable_audio_serve.engine import Engine, EngineOptions

_CLIP_S = 10.0
_FULL_CALLS, _SHORT_CALLS = 67, 10  # clips of each way per round; three rounds of a full benchmark have about 200

Allowance = tuple[float, float]  # allowed time: (multiple of the bare pipeline's time, milliseconds in addition to it)
Round = dict[str, list[float]]  # milliseconds of each clip, by way; `encode`: the part of `http` that encodes audio
_ALLOWED: Mapping[str, Mapping[str, Allowance]] = {
    "cpu": {"engine": (1.10, 25.0), "http": (1.10, 25.0)},
    "cuda": {"engine": (1.03, 1.0), "http": (1.10, 8.0)},
}


async def measure(settings: CaseSettings) -> dict[str, Any]:
    """Measure the three ways in alternation, in `settings.rounds` rounds. The result is the worst round.

    Raises VoidError if the engine's audio differs from the bare pipeline's.
    """
    entry, model = resolve_model(settings.model), load(settings)
    duration_s = min(_CLIP_S, model.spec.card.max_duration_s)
    arrival = Arrival(0.0, "a low drone", duration_s, seed=1, steps=8)
    request = to_request(arrival)
    options = EngineOptions(torch_threads=settings.threads)
    bare = open_side("lock", model, options=options)  # with one request at a time, its lock costs no time
    num_calls = _FULL_CALLS if settings.full else _SHORT_CALLS
    async with Engine(model, options) as engine:
        compare_audio([await bare.generate(request)], [await engine.generate(request)], mode=engine.mode)
        served = {"served": {"duration_padding_s": entry.card.default_duration_padding_s}}
        async with serving(entry, served, threads=settings.threads, device=settings.device) as sides:

            async def measure() -> Round:
                for _ in range(9):  # warm-up: opens all connections
                    await play(sides["served"], [arrival])
                calls: Round = {"bare": [], "engine": [], "http": [], "encode": []}
                for _ in range(num_calls):
                    calls["bare"].append(await _time_ms(lambda: bare.generate(request)))
                    calls["engine"].append(await _time_ms(lambda: engine.generate(request)))
                    (record,) = await play(sides["served"], [arrival])
                    calls["http"].append(record.latency_ms)
                    calls["encode"].append(record.stages_ms.get("encode", 0.0))
                return calls

            measured = [await in_quiet(measure) for _ in range(settings.rounds)]
    await bare.close()
    return {
        "clip_s": duration_s,
        **compare_ways([calls for calls, _ in measured], allowed=_ALLOWED[engine.device.type]),
        **describe_quiet([foreign_cores for _, foreign_cores in measured]),
    }


def compare_ways(rounds: Sequence[Round], *, allowed: Mapping[str, Allowance]) -> dict[str, Any]:
    """Returns percentiles of the times of each way over all rounds, and how its time compares with the bare pipeline's.

    For the comparisons, the median time of each round is used. `allowed` has the longest allowed time of each way: a
    multiple of the bare pipeline's time or that time plus some milliseconds, whichever is longer.
    """
    medians_ms = [{way: median(taken) for way, taken in calls.items()} for calls in rounds]
    figures: dict[str, Any] = {}
    for way, (ratio, ms) in allowed.items():
        figures |= worst(f"{way}_over_bare_ratio", [one[way] / one["bare"] for one in medians_ms])
        shares = [one[way] / max(ratio * one["bare"], one["bare"] + ms) for one in medians_ms]
        figures |= worst(f"{way}_over_allowed_ratio", shares)
    return {
        **figures,
        "encode_ms": median(ms for one in rounds for ms in one["encode"]),
        **{way: summarize([ms for one in rounds for ms in one[way]]) for way in ("bare", "engine", "http")},
    }


async def _time_ms(generate: Callable[[], Awaitable[object]]) -> float:
    started_at = time.perf_counter()
    await generate()
    return (time.perf_counter() - started_at) * 1000.0


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """Returns a table with one row: the times of the three ways, and their ratios to the bare pipeline."""
    return [
        {
            "clip (s)": results["clip_s"],
            **{f"{way} (ms)": results[way]["p50_ms"] for way in ("bare", "engine", "http")},
            "engine over bare": results["engine_over_bare_ratio"],
            "http over bare": results["http_over_bare_ratio"],
            "of it encoding (ms)": results["encode_ms"],
        }
    ]
