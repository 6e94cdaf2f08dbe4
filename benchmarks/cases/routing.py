"""What it is worth that a router knows how much work a request is: requests of `small-mixed` to the replica with the
least predicted work left, against Ray Serve's own router, which takes the shorter queue of two that it draws. Both are
models of one server, each of four stand-ins whose device is a clock, and get the same arrivals in turns. Clips have a
tenth of the mix's lengths and a frame takes ten times as long, so that the work is the mix's and little is sent.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.arrivals import Arrival, draw_arrivals, to_request
from benchmarks.cases.engine import resolve_model
from benchmarks.cases.scale import wait_for_replicas
from benchmarks.compare.quiet import Watch, describe_quiet, measure_in_quiet
from benchmarks.http_load import Load, LoadGenerator, load_generator, require_clips
from benchmarks.metrics import summarize
from benchmarks.servers.process import model_args, running_server, write_config
from benchmarks.servers.timed import SHORTENED, SHORTENING_DEVICE, predict_stages
from benchmarks.settings import CaseSettings
from benchmarks.workload import MIXES
from stable_audio_serve.core.catalog import ModelCard

OURS, SERVES = "least-work", "serve"
_SMALL_MIXED = MIXES["small-mixed"]
MIX = replace(_SMALL_MIXED, durations_s=tuple((s / SHORTENED, weight) for s, weight in _SMALL_MIXED.durations_s))
_IN_PROGRESS = 10_000  # no bound of ours may refuse a request
_QUEUE_S = 1e6
_WARM_UP = 16


@dataclass(frozen=True, slots=True)
class RoutingLoad:
    """`requests` a round at `share` of what the replicas can do."""

    replicas: int = 4
    requests: int = 200
    share: float = 0.8


FULL = RoutingLoad(requests=600)


@dataclass(frozen=True, slots=True)
class Side:
    """Latencies of one side in one round, milliseconds, and how late the client was."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    queue_mean_ms: float
    client_late_p95_ms: float


def run_routing_case(settings: CaseSettings, load: RoutingLoad | None = None) -> dict[str, Any]:
    """`settings.rounds` rounds of other requests; the worse round counts. Raises RuntimeError for any wrong answer."""
    load = load or (FULL if settings.full else RoutingLoad())
    rounds: list[dict[str, Side]] = []
    watches: list[Watch] = []
    with _sides(settings, load) as (client, card):
        for side in (OURS, SERVES):  # opens the connections to all replicas
            _play(client, side, _draw(card, load, count=_WARM_UP, seed=0), card=card)
        for seed in range(1, settings.rounds + 1):
            arrivals = _draw(card, load, count=load.requests, seed=seed)
            sides: dict[str, Side] = {}
            for side in (OURS, SERVES) if seed % 2 else (SERVES, OURS):
                sent, watch = measure_in_quiet(partial(_play, client, side, arrivals, card=card))
                sides[side] = _describe(sent)
                watches.append(watch)
            rounds.append(sides)
    return summarize_rounds(rounds) | describe_quiet(watches) | {"load": asdict(load)}


def summarize_rounds(rounds: Sequence[Mapping[str, Side]]) -> dict[str, Any]:
    """Returns the rounds with our latencies over those of Serve's router, of which the worst round counts."""
    ratios = {
        name: [getattr(sides[OURS], name) / getattr(sides[SERVES], name) for sides in rounds]
        for name in ("p50_ms", "p95_ms", "mean_ms")
    }
    return {
        **{f"{name.removesuffix('_ms')}_over_serve_ratio": max(values) for name, values in ratios.items()},
        **{f"{name.removesuffix('_ms')}_over_serve_ratio_rounds": values for name, values in ratios.items()},
        "rounds": [{name: asdict(side) for name, side in sides.items()} for sides in rounds],
    }


def _draw(card: ModelCard, load: RoutingLoad, *, count: int, seed: int) -> tuple[Arrival, ...]:
    """Returns requests that keep the replicas busy for the share of the time that the load says."""

    def draw(rate_hz: float) -> tuple[Arrival, ...]:
        return draw_arrivals(MIX, rate_hz=rate_hz, count=count, seed=seed, max_duration_s=card.max_duration_s).arrivals

    asked = draw(1.0)  # what is asked for does not depend on the rate
    work_s = sum(predict_stages(SHORTENING_DEVICE, to_request(arrival, card)).total_ms for arrival in asked) / 1000.0
    return draw(load.share * load.replicas * count / work_s)


def _play(client: LoadGenerator, side: str, arrivals: Sequence[Arrival], *, card: ModelCard) -> Load:  # noqa: PLR0917
    load = client.send(side, arrivals)
    require_clips(load, arrivals, channels=card.channels, sample_rate_hz=card.sample_rate_hz)
    return load


def _describe(load: Load) -> Side:
    return Side(
        **asdict(summarize([sent.latency_ms for sent in load.sent])),
        queue_mean_ms=summarize([sent.queue_ms for sent in load.sent]).mean_ms,
        client_late_p95_ms=summarize([sent.late_ms for sent in load.sent]).p95_ms,
    )


@contextmanager
def _sides(settings: CaseSettings, load: RoutingLoad) -> Iterator[tuple[LoadGenerator, ModelCard]]:
    entry = resolve_model(settings.model)
    models = [
        {**model_args(entry, name=side, threads=settings.threads, replicas=load.replicas), "max_queue_s": _QUEUE_S}
        for side in (OURS, SERVES)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = write_config(
            Path(folder),
            entry,
            threads=settings.threads,
            models=models,
            ingress={"max_ongoing_requests": _IN_PROGRESS},
            api={"max_steps": max(steps for steps, _ in MIX.steps)},
            import_path="benchmarks.servers.timed:build_shortening",
            deployments=[{"name": SERVES, "request_router_config": {}}],
        )
        with running_server(path) as server, load_generator(server.url) as client:
            wait_for_replicas(server, dict.fromkeys((OURS, SERVES), load.replicas))
            yield client, entry.card


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """Every round's latencies and ratio."""
    return [
        {
            "round": number,
            "requests": results["load"]["requests"],
            "replicas": results["load"]["replicas"],
            "p50_ms": sides[OURS]["p50_ms"],
            "p50_ms of Serve's": sides[SERVES]["p50_ms"],
            "p95_ms": sides[OURS]["p95_ms"],
            "p95_ms of Serve's": sides[SERVES]["p95_ms"],
            "p95_over_serve": sides[OURS]["p95_ms"] / sides[SERVES]["p95_ms"],
        }
        for number, sides in enumerate(results["rounds"], start=1)
    ]
