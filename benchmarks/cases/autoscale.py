"""What it is worth to count work instead of requests when replicas are added: bursts of unlike clips to a model that
follows its predicted work, and to one with Ray Serve's own policy and its defaults (two requests per replica, the mean
of 30 s). Both have stand-ins whose device is a clock, the same bounds and delays, and get the same arrivals in turns. A
replica counts from when it is ready until it is told to go.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from benchmarks.arrivals import Arrival, draw_arrivals
from benchmarks.cases.engine import resolve_model
from benchmarks.cases.scale import wait_for_replicas
from benchmarks.compare.quiet import Watch, describe_quiet, measure_in_quiet
from benchmarks.http_load import LoadGenerator, load_generator, require_clips
from benchmarks.metrics import summarize
from benchmarks.servers.process import Server, model_args, running_server, write_config
from benchmarks.settings import CaseSettings
from benchmarks.workload import MIXES, Mix
from stable_audio_serve.core.catalog import ModelCard

OURS, SERVES = "work", "serve"
_WIDE = MIXES["demo-wide"]
_IN_PROGRESS = 10_000  # no bound of ours may refuse a request
_QUEUE_S = 1e6
_LOOK_S = 0.25
_START_S = 60.0  # until both models have as few replicas as at the start of a round


@dataclass(frozen=True, slots=True)
class AutoscaleLoad:
    """`requests` a round in bursts of `on_s` seconds with as many seconds between them, on average `rate_hz`.

    Replicas are counted from the first arrival until `after_s` behind the last one.
    """

    requests: int = 180
    rate_hz: float = 3.0
    on_s: float = 30.0
    after_s: float = 10.0
    max_replicas: int = 6
    target_wait_s: float = 1.0
    upscale_delay_s: float = 1.0
    downscale_delay_s: float = 10.0


FULL = AutoscaleLoad(requests=540)


@dataclass(frozen=True, slots=True)
class Side:
    """Latencies of one side in one round, milliseconds, and the replicas it had: their time, and the most at once."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    replica_s: float
    most_replicas: int
    client_late_p95_ms: float


@dataclass
class Count:
    """How many replicas of a model were ready, as its server says, at times in seconds on one clock."""

    samples: list[tuple[float, int]] = field(default_factory=list)

    def replica_s(self, *, start: float, end: float) -> float:
        """Returns the time of all replicas together between two times, each sample holding until the next one."""
        ends = [at for at, _ in self.samples[1:]] + [end]
        return sum(
            number * max(0.0, min(until, end) - max(at, start))
            for (at, number), until in zip(self.samples, ends, strict=True)
        )


def run_autoscale_case(settings: CaseSettings, load: AutoscaleLoad | None = None) -> dict[str, Any]:
    """`settings.rounds` rounds of other requests; the worse round counts. Raises RuntimeError for any wrong answer."""
    load = load or (FULL if settings.full else AutoscaleLoad())
    rounds: list[dict[str, Side]] = []
    watches: list[Watch] = []
    with _sides(settings, load) as (server, client, card):
        for seed in range(1, settings.rounds + 1):
            arrivals = _draw(card, load, seed=seed)
            sides: dict[str, Side] = {}
            for side in (OURS, SERVES) if seed % 2 else (SERVES, OURS):
                play = partial(_play, server, client, side=side, arrivals=arrivals, load=load, card=card)
                sides[side], watch = measure_in_quiet(play)
                watches.append(watch)
            rounds.append(sides)
    return summarize_rounds(rounds) | describe_quiet(watches) | {"load": asdict(load)}


def summarize_rounds(rounds: Sequence[Mapping[str, Side]]) -> dict[str, Any]:
    """Returns the rounds with our figures over those of Serve's policy, of which the worst round counts."""
    ratios = {
        name: [getattr(sides[OURS], name) / getattr(sides[SERVES], name) for sides in rounds]
        for name in ("p50_ms", "p95_ms", "replica_s")
    }
    return {
        **{f"{name.removesuffix('_ms')}_over_serve_ratio": max(values) for name, values in ratios.items()},
        **{f"{name.removesuffix('_ms')}_over_serve_ratio_rounds": values for name, values in ratios.items()},
        "rounds": [{name: asdict(side) for name, side in sides.items()} for sides in rounds],
    }


def _draw(card: ModelCard, load: AutoscaleLoad, *, seed: int) -> tuple[Arrival, ...]:
    mix = Mix("bursts", _WIDE.durations_s, _WIDE.steps, on_s=load.on_s, off_s=load.on_s)
    return draw_arrivals(
        mix, rate_hz=load.rate_hz, count=load.requests, seed=seed, max_duration_s=card.max_duration_s
    ).arrivals


def _play(
    server: Server,
    client: LoadGenerator,
    *,
    side: str,
    arrivals: Sequence[Arrival],
    load: AutoscaleLoad,
    card: ModelCard,
) -> Side:
    wait_for_replicas(server, {OURS: 1, SERVES: 1})
    _wait_for_one(server, side)
    with _counting(server, side) as count:
        started_at = time.monotonic()
        sent = client.send(side, arrivals)
        ends_at = started_at + arrivals[-1].at_s + load.after_s
        time.sleep(max(0.0, ends_at - time.monotonic()))
    require_clips(sent, arrivals, channels=card.channels, sample_rate_hz=card.sample_rate_hz)
    return Side(
        **asdict(summarize([request.latency_ms for request in sent.sent])),
        replica_s=count.replica_s(start=started_at, end=ends_at),
        most_replicas=max(number for _, number in count.samples),
        client_late_p95_ms=summarize([request.late_ms for request in sent.sent]).p95_ms,
    )


def _wait_for_one(server: Server, side: str) -> None:
    """Wait until a round before has lost its replicas. Raises RuntimeError if that takes too long."""
    ends_at = time.monotonic() + _START_S
    while _num_replicas(server, side) > 1:
        if time.monotonic() > ends_at:
            raise RuntimeError(f"{side} has more than one replica long after its load ended")
        time.sleep(_LOOK_S)


@contextmanager
def _counting(server: Server, side: str) -> Iterator[Count]:
    count, is_over = Count(), threading.Event()

    def look() -> None:
        while not is_over.is_set():
            count.samples.append((time.monotonic(), _num_replicas(server, side)))
            is_over.wait(_LOOK_S)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield count
    finally:
        is_over.set()
        thread.join()


def _num_replicas(server: Server, side: str) -> int:
    health = httpx.get(f"{server.url}/health", trust_env=False).raise_for_status().json()
    return int(health["models"][side]["num_replicas"])


@contextmanager
def _sides(settings: CaseSettings, load: AutoscaleLoad) -> Iterator[tuple[Server, LoadGenerator, ModelCard]]:
    entry = resolve_model(settings.model)
    bounds = {"min_replicas": 1, "max_replicas": load.max_replicas}
    delays = {"upscale_delay_s": load.upscale_delay_s, "downscale_delay_s": load.downscale_delay_s}
    ours = {**bounds, **delays, "target_wait_s": load.target_wait_s}
    models = [
        {**model_args(entry, name=side, threads=settings.threads), "max_queue_s": _QUEUE_S, "replicas": ours}
        for side in (OURS, SERVES)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = write_config(
            Path(folder),
            entry,
            threads=settings.threads,
            models=models,
            ingress={"max_ongoing_requests": _IN_PROGRESS},
            import_path="benchmarks.servers.timed:build",
            deployments=[{"name": SERVES, "autoscaling_config": {**bounds, **delays, "metrics_interval_s": 1.0}}],
        )
        with running_server(path) as server, load_generator(server.url) as client:
            yield server, client, entry.card


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """Every round's latencies, replicas and ratios."""
    return [
        {
            "round": number,
            "requests": results["load"]["requests"],
            "p95_ms": sides[OURS]["p95_ms"],
            "p95_ms of Serve's": sides[SERVES]["p95_ms"],
            "p95_over_serve": sides[OURS]["p95_ms"] / sides[SERVES]["p95_ms"],
            "replica_s": sides[OURS]["replica_s"],
            "replica_s of Serve's": sides[SERVES]["replica_s"],
            "replica_s_over_serve": sides[OURS]["replica_s"] / sides[SERVES]["replica_s"],
        }
        for number, sides in enumerate(results["rounds"], start=1)
    ]
