"""What HTTP, Ray and encoding add to the engine's own time for one clip: the same request, alternately in process and
over HTTP, and what the server says its stages took.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.cases.engine import load, resolve_model
from benchmarks.metrics import summarize, worst_ratio
from benchmarks.servers.process import running_server, write_config
from benchmarks.settings import CaseSettings
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.engine import Engine, EngineOptions

_CLIP_S = 10.0
_CALLS_PER_ROUND = 10
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


async def run_http_case(settings: CaseSettings) -> dict[str, Any]:
    """Alternating calls; the worse round counts."""
    entry = resolve_model(settings.model)
    model = load(settings)
    duration_s = min(_CLIP_S, model.spec.card.max_duration_s)
    request = GenerationRequest(prompt="a low drone", duration_s=duration_s, seed=1, steps=8)
    async with Engine(model, EngineOptions(torch_threads=settings.threads)) as engine:
        with tempfile.TemporaryDirectory() as folder:
            config = write_config(Path(folder), entry, threads=settings.threads)
            with running_server(config) as server:
                async with httpx.AsyncClient(base_url=server.url, timeout=120.0) as client:
                    rounds = [
                        await _round(engine, client, request=request, model=entry.card.name)
                        for _ in range(settings.rounds)
                    ]
    alone = [(median(c.wall_ms for c in calls), median(own_ms)) for own_ms, calls in rounds]
    calls = [call for _, some in rounds for call in some]
    return {
        "clip_s": duration_s,
        "http_over_engine_ratio": worst_ratio(alone, larger_is_better=False),
        "added_ms": {"worst_round_median": max(median(c.added_ms for c in some) for _, some in rounds)},
        "encode_ms": median(call.stages_ms.get("encode", 0.0) for call in calls),
        "engine": asdict(summarize([ms for own_ms, _ in rounds for ms in own_ms])),
        "http": asdict(summarize([call.wall_ms for call in calls])),
        "added": asdict(summarize([call.added_ms for call in calls])),
    }


async def _round(
    engine: Engine, client: httpx.AsyncClient, *, request: GenerationRequest, model: str
) -> tuple[Sequence[float], Sequence[Call]]:
    await engine.generate(request)
    await call(client, request, model=model)
    own_ms, calls = [], []
    for _ in range(_CALLS_PER_ROUND):
        started_at = time.perf_counter()
        await engine.generate(request)
        own_ms.append((time.perf_counter() - started_at) * 1000.0)
        calls.append(await call(client, request, model=model))
    return own_ms, calls


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
