"""What the engine adds to the bare pipeline for one clip by itself, and HTTP, Ray and encoding to the engine: the same
request by all three ways in turns, and what the server says its stages took.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.cases.engine import compare_audio, load, resolve_model
from benchmarks.compare.quiet import describe_quiet, wait_in_quiet
from benchmarks.metrics import summarize, worst_ratio
from benchmarks.servers.process import running_server, write_config
from benchmarks.settings import CaseSettings
from benchmarks.sides.servers import open_side
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult
from stable_audio_serve.engine import Engine, EngineOptions

_CLIP_S = 10.0
_FULL_CALLS, _SHORT_CALLS = 67, 10  # of each way in a round: 200 in three
Generate = Callable[[], Awaitable[GenerationResult]]

Allowance = tuple[float, float]  # times the bare pipeline, milliseconds more

_ALLOWED: Mapping[str, Mapping[str, Allowance]] = {
    "cpu": {"engine": (1.10, 25.0), "http": (1.10, 25.0)},
    "cuda": {"engine": (1.03, 1.0), "http": (1.10, 8.0)},
}
_TIMING = re.compile(r"(\w+);dur=([0-9.]+)")


@dataclass(frozen=True, slots=True)
class Call:
    """One request over HTTP, in milliseconds: its whole time and what the server says of its stages."""

    wall_ms: float
    stages_ms: dict[str, float]

    @property
    def engine_ms(self) -> float:
        """The engine's own time within this very request."""
        return sum(ms for stage, ms in self.stages_ms.items() if stage not in ("total", "encode", "store"))

    @property
    def added_ms(self) -> float:
        """What everything around the engine cost: HTTP, Ray, encoding."""
        return self.wall_ms - self.engine_ms


@dataclass(frozen=True, slots=True)
class Round:
    """Milliseconds of the calls of one round by each way."""

    bare_ms: Sequence[float]
    engine_ms: Sequence[float]
    http: Sequence[Call]

    def medians_ms(self) -> dict[str, float]:
        return {
            "bare": median(self.bare_ms),
            "engine": median(self.engine_ms),
            "http": median(call.wall_ms for call in self.http),
        }


async def run_http_case(settings: CaseSettings) -> dict[str, Any]:
    """Alternating calls; the worse round counts. Raises RuntimeError if the engine's audio is not the pipeline's."""
    entry = resolve_model(settings.model)
    model = load(settings)
    duration_s = min(_CLIP_S, model.spec.card.max_duration_s)
    request = GenerationRequest(prompt="a low drone", duration_s=duration_s, seed=1, steps=8)
    options = EngineOptions(torch_threads=settings.threads)
    bare = open_side("lock", model, options=options)  # without others nobody waits at its lock
    num_calls = _FULL_CALLS if settings.full else _SHORT_CALLS
    async with Engine(model, options) as engine:
        compare_audio([await bare.generate(request)], [await engine.generate(request)], mode=engine.mode)
        with tempfile.TemporaryDirectory() as folder:
            config = write_config(Path(folder), entry, threads=settings.threads)
            with running_server(config) as server:
                async with httpx.AsyncClient(base_url=server.url, timeout=120.0) as client:
                    take = partial(
                        _round,
                        bare=partial(bare.generate, request),
                        engine=partial(engine.generate, request),
                        ask=partial(call, client, request, model=entry.card.name),
                        count=num_calls,
                    )
                    measured = [await wait_in_quiet(take) for _ in range(settings.rounds)]
    await bare.close()
    return {
        "clip_s": duration_s,
        "calls_per_round": num_calls,
        **compare_ways([calls for calls, _ in measured], allowed=_ALLOWED[engine.device.type]),
        **describe_quiet([watch for _, watch in measured]),
    }


def compare_ways(rounds: Sequence[Round], *, allowed: Mapping[str, Allowance]) -> dict[str, Any]:
    """Ratios and differences of the rounds' medians, and percentiles over all calls.

    A way may take so many times as long as the bare pipeline or so many milliseconds longer, the larger: `allowed`.
    """
    medians_ms = [calls.medians_ms() for calls in rounds]
    figures: dict[str, Any] = {}
    for slow, fast in (("engine", "bare"), ("http", "bare"), ("http", "engine")):
        pairs = [(way[slow], way[fast]) for way in medians_ms]
        figures[f"{slow}_over_{fast}_ratio"] = worst_ratio(pairs, larger_is_better=False)
        figures[f"{slow}_over_{fast}_added_ms"] = max(ours - theirs for ours, theirs in pairs)
    for way, (ratio, ms) in allowed.items():
        shares = [medians[way] / max(ratio * medians["bare"], medians["bare"] + ms) for medians in medians_ms]
        figures[f"{way}_over_allowed_ratio"] = max(shares)
        figures[f"{way}_over_allowed_ratio_rounds"] = shares
    calls = [call for some in rounds for call in some.http]
    return {
        **figures,
        "medians_ms_rounds": medians_ms,
        "added_ms": {"worst_round_median": max(median(c.added_ms for c in some.http) for some in rounds)},
        "encode_ms": median(call.stages_ms.get("encode", 0.0) for call in calls),
        "bare": asdict(summarize([ms for some in rounds for ms in some.bare_ms])),
        "engine": asdict(summarize([ms for some in rounds for ms in some.engine_ms])),
        "http": asdict(summarize([call.wall_ms for call in calls])),
        "added": asdict(summarize([call.added_ms for call in calls])),
    }


async def _round(*, bare: Generate, engine: Generate, ask: Callable[[], Awaitable[Call]], count: int) -> Round:
    for warm_up in (bare, engine, ask):
        await warm_up()
    bare_ms, engine_ms, calls = [], [], []
    for _ in range(count):
        bare_ms.append(await _time_ms(bare))
        engine_ms.append(await _time_ms(engine))
        calls.append(await ask())
    return Round(bare_ms, engine_ms, calls)


async def _time_ms(generate: Generate) -> float:
    started_at = time.perf_counter()
    await generate()
    return (time.perf_counter() - started_at) * 1000.0


async def call(client: httpx.AsyncClient, request: GenerationRequest, *, model: str) -> Call:
    """Ask the server for one clip and time it."""
    body = {
        "model": model,
        "prompt": request.prompt,
        "duration": request.duration_s,
        "seed": request.seed,
        "steps": request.steps,
    }
    started_at = time.perf_counter()
    response = await client.post("/v1/audio/generations", json=body)
    wall_ms = (time.perf_counter() - started_at) * 1000.0
    response.raise_for_status()
    stages_ms = parse_server_timing(response.headers.get("server-timing", ""))
    return Call(wall_ms, stages_ms)


def parse_server_timing(header: str) -> dict[str, float]:
    """Milliseconds by metric name of a Server-Timing header."""
    return {name: float(ms) for name, ms in _TIMING.findall(header)}


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """What the way to the engine costs."""
    return [
        {
            "clip_s": results["clip_s"],
            **{f"{way}_ms": results[way]["p50_ms"] for way in ("bare", "engine", "http")},
            "engine_over_bare": results["engine_over_bare_ratio"],
            "http_over_bare": results["http_over_bare_ratio"],
            "http_over_engine": results["http_over_engine_ratio"],
            "added_ms": results["added_ms"]["worst_round_median"],
            "of_it_encode_ms": results["encode_ms"],
        }
    ]
