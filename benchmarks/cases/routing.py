"""Compares our router with Ray Serve's, for requests of the mix `small-mixed`.

One server has two models, one for each router, with four simulated replicas each. Clips have a tenth of their length in
the mix, and the simulated time of a latent frame is ten times as long, so that the server sends less audio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.dialects import OverHttp
from benchmarks.figures import summarize, worst
from benchmarks.load import describe_quiet, in_quiet, play_clips
from benchmarks.models import CaseSettings, resolve_model
from benchmarks.servers.process import serving
from benchmarks.servers.timed import SHORTENING_DEVICE
from benchmarks.workload import MIXES, Arrival, draw_arrivals, to_request
from stable_audio_serve.core.catalog import ModelCard

_OURS, _SERVES = "least-work", "serve"
_SMALL_MIXED = MIXES["small-mixed"]
_MIX = replace(_SMALL_MIXED, durations_s=tuple((s / 10, weight) for s, weight in _SMALL_MIXED.durations_s))
_QUEUE_S = 1e6
_WARM_UP = 16
_REPLICAS = 4
_REQUESTS = (200, 600)  # requests per round, in the short and the full benchmark
_LOAD_SHARE = 0.8  # rate of requests, as a share of the replicas' capacity


async def measure(settings: CaseSettings) -> dict[str, Any]:
    """Measure `settings.rounds` rounds with different requests. The result is the worst round."""
    rounds: list[dict[str, dict[str, float]]] = []
    foreign_cores: list[float] = []
    entry = resolve_model(settings.model)
    card, num_requests = entry.card, _REQUESTS[settings.full]
    model = {"replicas": {"min_replicas": _REPLICAS, "max_replicas": _REPLICAS}, "max_queue_s": _QUEUE_S}
    async with serving(
        entry,
        {_OURS: model, _SERVES: model},
        threads=settings.threads,
        api={"max_steps": max(steps for steps, _ in _MIX.steps)},
        import_path="benchmarks.servers.timed:build_shortening",
        deployments=[{"name": _SERVES, "request_router_config": {}}],
    ) as sides:
        for side in sides.values():  # warm-up: opens the connections to all replicas
            await _play(side, _draw(card, count=_WARM_UP, seed=0), card=card)
        for seed in range(1, settings.rounds + 1):
            arrivals = _draw(card, count=num_requests, seed=seed)
            figures = {}
            for name in (_OURS, _SERVES) if seed % 2 else (_SERVES, _OURS):
                figures[name], foreign = await in_quiet(partial(_play, sides[name], arrivals, card=card))
                foreign_cores.append(foreign)
            rounds.append(figures)
    ratios = [sides[_OURS]["p95_ms"] / sides[_SERVES]["p95_ms"] for sides in rounds]
    return {"rounds": rounds, **describe_quiet(foreign_cores), **worst("p95_over_serve_ratio", ratios)}


def _draw(card: ModelCard, *, count: int, seed: int) -> tuple[Arrival, ...]:
    """Returns requests that keep the replicas busy for `_LOAD_SHARE` of the time."""

    def draw(rate_hz: float) -> tuple[Arrival, ...]:
        return draw_arrivals(_MIX, rate_hz=rate_hz, count=count, seed=seed, max_duration_s=card.max_duration_s)

    asked = draw(1.0)  # any rate: it changes only the arrival times, which are not used here
    work_s = sum(SHORTENING_DEVICE.stages(to_request(arrival)).total_ms for arrival in asked) / 1000.0
    return draw(_LOAD_SHARE * _REPLICAS * count / work_s)


async def _play(side: OverHttp, arrivals: Sequence[Arrival], *, card: ModelCard) -> dict[str, float]:
    records = await play_clips(side, arrivals, sample_rate_hz=card.sample_rate_hz)
    return summarize([record.latency_ms for record in records])


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """Returns a table with one row for each round."""
    return [
        {
            "round": number,
            "p95, least work (ms)": sides[_OURS]["p95_ms"],
            "p95, Serve's router (ms)": sides[_SERVES]["p95_ms"],
            "p95 over Serve's": sides[_OURS]["p95_ms"] / sides[_SERVES]["p95_ms"],
        }
        for number, sides in enumerate(results["rounds"], start=1)
    ]
