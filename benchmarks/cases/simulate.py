"""Compares the engine's scheduling with a lock server (one request at a time), both on a simulated H200 GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from benchmarks.figures import capacity_rps, percentile, steady_latencies_ms, worst
from benchmarks.load import Record
from benchmarks.models import CaseSettings
from benchmarks.simulation import MEDIUM, SMALL, Gpu, Network, SimulatedEngine, record_of, work_of
from benchmarks.workload import Arrival, draw_arrivals

_LOAD_SHARE = 0.8  # rate of requests for latencies, as a share of the lock server's capacity
_REQUESTS = {"small-mixed": (400, 2000), "medium-mixed": (200, 400)}  # requests in a list: short, full benchmark
_SEEDS = (1, 2, 3)  # each seed gives another list of requests
_NETWORKS = {"small-mixed": SMALL, "medium-mixed": MEDIUM}


async def measure(settings: CaseSettings) -> dict[str, Any]:
    """Returns the engine's figures divided by the lock server's, for each mix.

    Each figure is the worst of all seeds: the lowest ratio of capacities, the highest ratio of latencies. The ratios of
    all seeds are next to it.
    """
    mixes: dict[str, Any] = {}
    for mix, network in _NETWORKS.items():
        count = _REQUESTS[mix][settings.full]
        seeds = [_compare(mix, network, count=count, seed=seed) for seed in _SEEDS]
        packed: dict[str, Any] = {}
        for name in seeds[0]:
            packed |= worst(name, [seed[name] for seed in seeds], larger_is_better=name.startswith("capacity"))
        mixes[mix] = {"num_requests": count, "packed": packed}
    return {"device": "arithmetic: an H200", "mixes": mixes}


def _compare(mix: str, network: Network, *, count: int, seed: int) -> dict[str, float]:
    """Returns the engine's figures divided by the lock server's figures, for the same requests."""

    def draw(rate_hz: float | None) -> tuple[Arrival, ...]:
        return draw_arrivals(mix, rate_hz=rate_hz, count=count, seed=seed, max_duration_s=network.longest_s)

    gpu, burst = Gpu(network), draw(None)
    lock_hz = capacity_rps(run_lock(burst, gpu))
    replay = draw(_LOAD_SHARE * lock_hz)
    lock, ours = run_lock(replay, gpu), SimulatedEngine(gpu).run(replay)
    ratios = {"capacity_over_lock_ratio": capacity_rps(SimulatedEngine(gpu).run(burst)) / lock_hz}
    for steps in (None, *sorted({arrival.steps for arrival in replay})):
        p95, lock_p95 = (percentile(steady_latencies_ms(records, steps=steps), 95) for records in (ours, lock))
        ratios[f"p95_{steps}_over_lock_ratio" if steps else "p95_over_lock_ratio"] = p95 / lock_p95
    return ratios


def run_lock(arrivals: Iterable[Arrival], gpu: Gpu) -> list[Record]:
    """Simulate a server that serves one request at a time, first come, first served. Returns its records."""
    now_ms = 0.0
    records: list[Record] = []
    known: set[str] = set()
    for arrival in arrivals:
        work = work_of(arrival, gpu.network)
        now_ms = max(now_ms, 1000.0 * arrival.at_s)
        now_ms += 0.0 if arrival.prompt in known else gpu.prompt_ms
        now_ms += sum(gpu.step_ms([work.frames] * branches) for branches in work.branches)
        now_ms += sum(gpu.decode_ms(len(list(same)), frames) for frames, same in groupby(sorted(work.decode_left)))
        known.add(arrival.prompt)
        records.append(record_of(arrival, now_ms))
    return records


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """Returns a table with one row for each mix."""
    return [
        {
            "mix": mix,
            "capacity over lock": figures["packed"]["capacity_over_lock_ratio"],
            "p95 over lock": figures["packed"]["p95_over_lock_ratio"],
            "p95 of 8 steps": figures["packed"]["p95_8_over_lock_ratio"],
            "p95 of 100 steps": figures["packed"]["p95_100_over_lock_ratio"],
        }
        for mix, figures in results["mixes"].items()
    ]
