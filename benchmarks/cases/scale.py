"""What more replicas are worth: the same burst of requests to 1, 2, 4 ... of them over HTTP, and what finding the right
one costs. On stand-ins whose device is a clock, so that many fit on two cores, and on the real model.

All sides are models of one server, each with a fixed number of replicas, so that they share everything else.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.arrivals import Arrival, draw_arrivals
from benchmarks.cases.engine import resolve_model
from benchmarks.compare.quiet import Watch, describe_quiet, measure_in_quiet
from benchmarks.http_load import Load, LoadGenerator, Sent, load_generator, require_clips
from benchmarks.metrics import percentile, summarize
from benchmarks.servers.cpu_times import read_cpu_s, replicas_use_torch
from benchmarks.servers.process import Server, model_args, running_server, write_config
from benchmarks.settings import CaseSettings
from benchmarks.workload import MIXES, Mix
from stable_audio_serve.models.registry import ModelEntry

_STAND_IN, _MODEL = "benchmarks.servers.timed:build", "stable_audio_serve.serving.app:build"
# Equal clips of 270 ms: sixteen devices leave two cores some room, and no share is uneven by the clips' lengths.
_CLIPS = Mix("stand-in", durations_s=((1.0, 1.0),), steps=((24, 1.0),), spread=0.0)
_MODEL_MIX = "demo-wide"
_SEED = 1
_IN_PROGRESS = 10_000  # no bound of ours may refuse a burst
_WARM_UP_PER_REPLICA = 4
_START_TIMEOUT_S = 300.0
_LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class ScaleLoad:
    """Replica counts, least first, and how much is sent: `requests` to every count up to `same_up_to`, so many more to
    larger ones that each replica gets as many as there. `spread_share` of what all replicas can do is offered to the
    largest count when the way to a replica is measured, `alone` requests are sent one by one."""

    counts: tuple[int, ...] = (1, 2, 4)
    requests: int = 60
    same_up_to: int = 4
    alone: int = 10
    spread: int = 12
    spread_share: float = 0.25
    model_counts: tuple[int, ...] = (1, 2)
    model_requests: int = 60

    def requests_to(self, count: int) -> int:
        """The length of the burst to this many replicas."""
        return self.requests * max(count, self.same_up_to) // self.same_up_to


FULL = ScaleLoad(counts=(1, 2, 4, 8, 16), requests=320, alone=200, spread=2000, model_requests=300)


@dataclass(frozen=True, slots=True)
class Burst:
    """What a number of replicas made of requests that came at once: milliseconds of processor time for each by role,
    and the cores used by server and client, by the client alone and by other programs.

    `fullest_over_even` is the device time given to the fullest of several stand-ins over that of an even share, which
    routing alone decides; None for a real model, whose requests share its device.
    """

    capacity_rps: float
    cpu_ms_per_request: Mapping[str, float]
    busy_cores: float
    client_cores: float
    foreign_cores: float | None
    fullest_over_even: float | None


def run_scale_case(settings: CaseSettings, load: ScaleLoad | None = None) -> dict[str, Any]:
    """`settings.rounds` rounds over all counts; the worse round counts. Raises RuntimeError for any wrong answer."""
    load = load or (FULL if settings.full else ScaleLoad())
    sides = {"stand_in": measure_stand_in(settings, load), "model": measure_model(settings, load)}
    return {
        "load": asdict(load),
        "target_capacity_over_one": {"stand_in": {2: 1.9, 4: 3.6}, "model": {2: 1.6}},
        "is_void": any(figures["is_void"] for figures in sides.values()),
        **sides,
    }


def measure_stand_in(settings: CaseSettings, load: ScaleLoad) -> dict[str, Any]:
    """Bursts to replicas that only wait, then what the way to one of many costs. Raises RuntimeError if they use torch:
    that many would not fit."""
    with _replicas(settings, load.counts, import_path=_STAND_IN) as side:
        if replicas_use_torch(side.server.pid):
            raise RuntimeError("a stand-in replica loaded torch")
        figures = side.burst(_CLIPS, load.counts, requests_to=load.requests_to, rounds=settings.rounds)
        most, capacity_rps = load.counts[-1], min(figures["capacity_rps"][load.counts[0]])
        return figures | {"routing": side.route((load.counts[0], most), load=load, one_rps=capacity_rps)}


def measure_model(settings: CaseSettings, load: ScaleLoad) -> dict[str, Any]:
    """Bursts to replicas of the real model."""
    with _replicas(settings, load.model_counts, import_path=_MODEL) as side:
        return side.burst(
            MIXES[_MODEL_MIX],
            load.model_counts,
            requests_to=lambda count: load.model_requests,
            rounds=settings.rounds,
        )


class _Side:
    """One server with a model for each number of replicas."""

    def __init__(self, server: Server, client: LoadGenerator, *, entry: ModelEntry, is_timed: bool) -> None:
        self.server = server
        self._client = client
        self._card = entry.card
        self._is_timed = is_timed

    def burst(
        self, mix: Mix, counts: Sequence[int], *, requests_to: Callable[[int], int], rounds: int
    ) -> dict[str, Any]:
        """Every count in turn, `rounds` times."""
        for count in counts:  # opens the connections to all of them
            self._send(count, self._draw(mix, count * _WARM_UP_PER_REPLICA))
        bursts = [
            {count: self._burst(mix, count, requests=requests_to(count)) for count in counts} for _ in range(rounds)
        ]
        capacity_rps = {count: [sides[count].capacity_rps for sides in bursts] for count in counts}
        return {
            "requests": {count: requests_to(count) for count in counts},
            "capacity_rps": capacity_rps,
            "capacity_over_one_ratios": ratios_over_first(capacity_rps),
            "worst_capacity_over_one": worst_over_first(capacity_rps),
            "worst_fullest_over_even": {
                count: max(b[count].fullest_over_even or 1.0 for b in bursts) for count in counts if self._is_timed
            },
            "worst_cpu_ms_per_request": {
                count: max(sum(sides[count].cpu_ms_per_request.values()) for sides in bursts) for count in counts
            },
            **describe_quiet([Watch(burst.foreign_cores) for sides in bursts for burst in sides.values()]),
            "rounds": [{count: asdict(burst) for count, burst in sides.items()} for sides in bursts],
        }

    def route(self, counts: Sequence[int], *, load: ScaleLoad, one_rps: float) -> dict[str, Any]:
        """What the way to a replica and back takes beside the replica's own time: one request after another, then many
        at random times; there also how long they waited for a device although others were free."""
        alone = {count: self._client.send_alone(_name(count), self._draw(_CLIPS, load.alone)) for count in counts}
        spread = {}
        for count in counts:
            rate_hz = load.spread_share * one_rps * count
            requests = max(1, load.spread * count // counts[-1])
            spread[count] = {
                "rate_hz": rate_hz,
                **_way(self._send(count, self._draw(_CLIPS, requests, rate_hz=rate_hz)).sent),
            }
        return {"alone": {count: _way(sent) for count, sent in alone.items()}, "spread": spread}

    def _burst(self, mix: Mix, count: int, *, requests: int) -> Burst:
        arrivals = self._draw(mix, requests)

        def measure() -> tuple[Load, dict[str, float]]:
            used_s = read_cpu_s(self.server.pid)
            load = self._send(count, arrivals)
            by_role_s = {role: now_s - used_s[role] for role, now_s in read_cpu_s(self.server.pid).items()}
            return load, by_role_s | {"client": load.cpu_s}

        (load, by_role_s), watch = measure_in_quiet(measure)
        return Burst(
            capacity_rps=load.rate_hz,
            cpu_ms_per_request={role: used_s * 1000.0 / requests for role, used_s in by_role_s.items()},
            busy_cores=sum(by_role_s.values()) / load.span_s,
            client_cores=load.client_cores,
            foreign_cores=watch.foreign_cores,
            fullest_over_even=fullest_over_even(load.sent, replicas=count) if self._is_timed else None,
        )

    def _send(self, count: int, arrivals: Sequence[Arrival]) -> Load:
        load = self._client.send(_name(count), arrivals)
        require_clips(load, arrivals, channels=self._card.channels, sample_rate_hz=self._card.sample_rate_hz)
        return load

    def _draw(self, mix: Mix, requests: int, *, rate_hz: float | None = None) -> tuple[Arrival, ...]:
        longest_s = self._card.max_duration_s
        return draw_arrivals(mix, rate_hz=rate_hz, count=requests, seed=_SEED, max_duration_s=longest_s).arrivals


def ratios_over_first(values: Mapping[int, Sequence[float]]) -> dict[int, list[float]]:
    """Returns each key's values round by round over those of the first key, which is left out."""
    first, *others = values
    return {key: [value / one for value, one in zip(values[key], values[first], strict=True)] for key in others}


def worst_over_first(values: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """Returns the least of those ratios for each key."""
    return {key: min(ratios) for key, ratios in ratios_over_first(values).items()}


def fullest_over_even(sent: Sequence[Sent], *, replicas: int) -> float:
    """Returns how much more device time the fullest replica was given than an even share, for requests that came at
    once to devices that do one thing at a time: the longest stay of a request is what its replica was given."""
    work_ms = sum(request.replica_ms - request.queue_ms for request in sent)
    return max(request.replica_ms for request in sent) * replicas / work_ms


def _way(sent: Sequence[Sent]) -> dict[str, float]:
    added = summarize([request.added_ms for request in sent])
    queue_ms = [request.queue_ms for request in sent]
    return {
        "requests": len(sent),
        "added_p50_ms": added.p50_ms,
        "added_p95_ms": added.p95_ms,
        "queue_p50_ms": percentile(queue_ms, 0.5),
        "queue_p95_ms": percentile(queue_ms, 0.95),
        "client_late_p95_ms": percentile([request.late_ms for request in sent], 0.95),
    }


@contextmanager
def _replicas(settings: CaseSettings, counts: Sequence[int], *, import_path: str) -> Iterator[_Side]:
    entry = resolve_model(settings.model)
    models = [model_args(entry, name=_name(count), threads=settings.threads, replicas=count) for count in counts]
    with tempfile.TemporaryDirectory() as folder:
        path = write_config(
            Path(folder),
            entry,
            threads=settings.threads,
            models=models,
            ingress={"max_ongoing_requests": _IN_PROGRESS},
            import_path=import_path,
        )
        with running_server(path) as server, load_generator(server.url) as client:
            wait_for_replicas(server, {_name(count): count for count in counts})  # the server is ready with one of each
            yield _Side(server, client, entry=entry, is_timed=import_path == _STAND_IN)


def wait_for_replicas(server: Server, counts: Mapping[str, int]) -> None:
    """Wait until every model has so many replicas. Raises RuntimeError if that takes too long."""
    ends_at = time.monotonic() + _START_TIMEOUT_S
    while True:
        models = httpx.get(f"{server.url}/health", trust_env=False).raise_for_status().json()["models"]
        missing = [name for name, count in counts.items() if models[name]["num_replicas"] < count]
        if not missing:
            return
        if time.monotonic() > ends_at:
            raise RuntimeError(f"not all replicas of {missing} came up within {_START_TIMEOUT_S:.0f} s")
        time.sleep(_LOOK_S)


def _name(count: int) -> str:
    return f"replicas-{count}"


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """What more replicas are worth, on stand-ins and on the model."""
    return [
        {
            "side": side,
            "replicas": count,
            "requests": results[side]["requests"][count],
            "capacity_over_one": ratio,
            "target": results["target_capacity_over_one"][side].get(count, ""),
            "cpu_ms_per_request": results[side]["worst_cpu_ms_per_request"][count],
        }
        for side in ("stand_in", "model")
        for count, ratio in results[side]["worst_capacity_over_one"].items()
    ]
