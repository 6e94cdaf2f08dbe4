"""The engine's own scheduling on a model of one H200, over a lock server on the same GPU: capacity when all requests
arrive at once, and p95 at 0.8 of the lock server's capacity. Figures come from arithmetic, not from a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from benchmarks.settings import CaseSettings
from benchmarks.simulate.device import MEDIUM, SMALL, Gpu, Network
from benchmarks.simulate.engine import Outcome, SimulatedEngine, work_of
from benchmarks.workload import Arrival, ArrivalList, draw_arrivals

_LOAD_SHARE = 0.8  # of the lock server's capacity
_STEADY = (0.15, 0.95)  # of the requests by arrival


@dataclass(frozen=True, slots=True)
class Sizes:
    """Requests of each list, and a list per seed."""

    requests: Mapping[str, int]
    seeds: tuple[int, ...] = (1, 2, 3)


FULL = Sizes({"small-mixed": 2000, "medium-mixed": 400})
SHORT = Sizes({"small-mixed": 400, "medium-mixed": 200})
_NETWORKS = {"small-mixed": SMALL, "medium-mixed": MEDIUM}


async def run_simulate(settings: CaseSettings) -> dict[str, Any]:
    """Returns the ratios of each mix; the worst seed counts: the lowest capacity, the highest latency."""
    sizes = FULL if settings.full else SHORT
    mixes: dict[str, Any] = {}
    for mix, network in _NETWORKS.items():
        count = sizes.requests[mix]
        seeds = [_compare(mix, network, count=count, seed=seed) for seed in sizes.seeds]
        worst = {name: (min if name.startswith("capacity") else max)(seed[name] for seed in seeds) for name in seeds[0]}
        mixes[mix] = {"num_requests": count, "packed": worst}
    return {"device": "arithmetic: an H200", "mixes": mixes}


def _compare(mix: str, network: Network, *, count: int, seed: int) -> dict[str, float]:
    """Returns the engine's figures over the lock server's, on the same lists of requests."""

    def draw(rate_hz: float | None) -> ArrivalList:
        return draw_arrivals(mix, rate_hz=rate_hz, count=count, seed=seed, max_duration_s=network.longest_s)

    gpu, burst = Gpu(network), draw(None)
    lock_hz = _rate_hz(run_lock(burst, gpu))
    replay = draw(_LOAD_SHARE * lock_hz)
    lock, ours = run_lock(replay, gpu), SimulatedEngine(gpu).run(replay)
    return {
        "capacity_over_lock_ratio": _rate_hz(SimulatedEngine(gpu).run(burst)) / lock_hz,
        "p95_over_lock_ratio": _p95_ms(ours) / _p95_ms(lock),
    } | {
        f"p95_{steps}_over_lock_ratio": _p95_ms(ours, steps=steps) / _p95_ms(lock, steps=steps)
        for steps in replay.step_classes
    }


def run_lock(arrivals: Iterable[Arrival], gpu: Gpu) -> list[Outcome]:
    """Serve one request at a time, first come first served."""
    now_ms = 0.0
    outcomes: list[Outcome] = []
    known: set[str] = set()
    for arrival in arrivals:
        work = work_of(arrival, gpu.network)
        now_ms = max(now_ms, 1000.0 * arrival.at_s)
        now_ms += 0.0 if arrival.prompt in known else gpu.prompt_ms
        now_ms += sum(gpu.step_ms([work.frames] * branches) for branches in work.branches)
        now_ms += sum(gpu.decode_ms(len(list(same)), frames) for frames, same in groupby(sorted(work.decode_left)))
        known.add(arrival.prompt)
        outcomes.append(Outcome(arrival, now_ms / 1000.0))
    return outcomes


def _rate_hz(outcomes: Sequence[Outcome]) -> float:
    return len(outcomes) / max(outcome.ended_at for outcome in outcomes)


def _p95_ms(outcomes: Sequence[Outcome], *, steps: int | None = None) -> float:
    ordered = sorted(outcomes, key=lambda outcome: outcome.arrival.at_s)
    kept = ordered[int(_STEADY[0] * len(ordered)) : int(_STEADY[1] * len(ordered))]
    return float(np.percentile([o.latency_ms for o in kept if steps in (None, o.arrival.steps)], 95))


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """One row per mix."""
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
