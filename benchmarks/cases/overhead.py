"""What everything around the engine costs for a 10 s clip: the same requests, in every dialect, to the application on
uvicorn alone and to the whole server on Ray Serve, both around an engine that takes no time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.cases.engine import resolve_model
from benchmarks.metrics import summarize, worst_ratio
from benchmarks.servers.process import running_instant_app, running_server, write_config
from benchmarks.settings import CaseSettings

_CLIP_S = 10.0
_CALLS_PER_ROUND = 20
_MIN_AUDIO_BYTES = 100_000  # an answer without the audio would be fast


@dataclass(frozen=True, slots=True)
class Route:
    """One way to ask for a clip; its p50 should stay under `target_ms`."""

    name: str
    path: str
    body: Mapping[str, object]
    target_ms: float


def _wav(name: str, path: str, **body: object) -> Route:
    return Route(f"{name} wav", path, body, target_ms=25.0)


def _flac(name: str, path: str, **body: object) -> Route:
    return Route(f"{name} flac", path, {**body, "response_format": "flac"}, target_ms=50.0)


_SA3 = {"prompt": "a low drone", "duration": _CLIP_S, "seed": 1}
_VLLM = {"input": "a low drone", "audio_length": _CLIP_S, "seed": 1}
ROUTES = (
    _wav("sa3", "/v1/audio/generations", **_SA3),
    _flac("sa3", "/v1/audio/generations", **_SA3),
    _wav("vllm", "/v1/audio/generate", **_VLLM),
    _flac("vllm", "/v1/audio/generate", **_VLLM),
    _wav("saos", "/generate", prompt="a low drone", seconds_total=int(_CLIP_S), seed=1),
    _wav("fal", "/fal-ai/stable-audio", prompt="a low drone", seconds_total=int(_CLIP_S)),
)


def run_overhead_case(settings: CaseSettings, routes: Sequence[Route] = ROUTES) -> dict[str, Any]:
    """Both servers at once, asked in turns; the worse round counts."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        entry = resolve_model(settings.model)
        config = write_config(folder, entry, threads=settings.threads, import_path="benchmarks.servers.instant:build")
        servers = {
            "app": stack.enter_context(running_instant_app()),
            "serve": stack.enter_context(running_server(config)),
        }
        clients = {
            side: stack.enter_context(httpx.Client(base_url=server.url, timeout=60.0, trust_env=False))
            for side, server in servers.items()
        }
        return {
            "clip_s": _CLIP_S,
            "routes": {route.name: measure_route(clients, route, rounds=settings.rounds) for route in routes},
        }


def measure_route(
    clients: Mapping[str, httpx.Client], route: Route, *, rounds: int, calls: int = _CALLS_PER_ROUND
) -> dict[str, Any]:
    """Figures of one route on each side, in milliseconds, after a quarter of a round's calls to warm up."""
    for client in clients.values():
        _call(client, route, count=max(1, calls // 4))
    latencies_ms = [
        {side: _call(client, route, count=calls) for side, client in clients.items()} for _ in range(rounds)
    ]
    p50_ms = [{side: summarize(values).p50_ms for side, values in sides.items()} for sides in latencies_ms]
    return {
        "target_p50_ms": route.target_ms,
        "worst_round_p50_ms": {side: max(sides[side] for sides in p50_ms) for side in clients},
        "serve_over_app_ratio": worst_ratio([(s["serve"], s["app"]) for s in p50_ms], larger_is_better=False),
        "latency": {side: asdict(summarize([ms for sides in latencies_ms for ms in sides[side]])) for side in clients},
    }


def _call(client: httpx.Client, route: Route, *, count: int) -> list[float]:
    """Milliseconds from each request to the last byte of its reply: the audio, or a link, which is then followed
    untimed. Raises RuntimeError without audio."""
    latencies_ms = []
    for _ in range(count):
        started_at = time.perf_counter()
        answer = client.post(route.path, json=route.body)
        latencies_ms.append((time.perf_counter() - started_at) * 1000.0)
        if answer.headers.get("content-type") == "application/json" and answer.status_code == 200:
            answer = client.get(answer.json()["audio_file"]["url"])
        if answer.status_code != 200 or len(answer.content) < _MIN_AUDIO_BYTES:
            raise RuntimeError(f"{route.name}: {answer.status_code}, {len(answer.content)} bytes: {answer.text[:200]}")
    return latencies_ms


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """What everything around the engine costs, by dialect."""
    return [
        {
            "route": name,
            "app_p50_ms": route["worst_round_p50_ms"]["app"],
            "serve_p50_ms": route["worst_round_p50_ms"]["serve"],
            "target_ms": route["target_p50_ms"],
            "serve_over_app": route["serve_over_app_ratio"],
        }
        for name, route in results["routes"].items()
    ]
