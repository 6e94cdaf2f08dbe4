"""Measures the capacity of 1, 2, 4 ... replicas with bursts of requests over HTTP.

The case measures replicas that run the real model, and simulated replicas. The device of a simulated replica is only a
clock, so that many replicas fit on two cores. One server serves several models: one with a single replica, one with two
replicas, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.figures import capacity_rps, worst
from benchmarks.load import Record, play_clips
from benchmarks.models import resolve_model
from benchmarks.quiet import Watch, describe_quiet, in_quiet
from benchmarks.servers.process import serving
from benchmarks.settings import CaseSettings
from benchmarks.workload import MIXES, Mix, draw_arrivals

_STAND_IN, _MODEL = "benchmarks.servers.timed:build", "stable_audio_serve.serving.app:build"
# Clips for simulated replicas. All are equal, so that every replica gets an equal share of the work. Each takes 270 ms,
# so that two cores can serve the HTTP requests of sixteen replicas.
_CLIPS = Mix("stand-in", durations_s=((1.0, 1.0),), steps=((24, 1.0),), spread=0.0)
_MODEL_MIX = MIXES["demo-wide"]
_WARM_UP_PER_REPLICA = 4
# {number of replicas: number of requests}, for the short and the full benchmark.
_STAND_IN_BURSTS = ({1: 60, 2: 60, 4: 60}, {1: 320, 2: 320, 4: 320, 8: 640, 16: 1280})
_MODEL_BURSTS = ({1: 60, 2: 60}, {1: 300, 2: 300})


async def measure(settings: CaseSettings) -> dict[str, Any]:
    """Measure all numbers of replicas in each of `settings.rounds` rounds. The result is the worst round."""
    stand_in = await _measure(settings, _CLIPS, _STAND_IN_BURSTS[settings.full], _STAND_IN)
    model = await _measure(settings, _MODEL_MIX, _MODEL_BURSTS[settings.full], _MODEL)
    return {"is_void": stand_in["is_void"] or model["is_void"], "stand_in": stand_in, "model": model}


async def _measure(  # noqa: PLR0917
    settings: CaseSettings, mix: Mix, requests: Mapping[int, int], import_path: str
) -> dict[str, Any]:
    """Measure `settings.rounds` rounds. In each round, every model gets a burst of requests, one after another.

    Each model has its own number of replicas. `requests` has the number of requests in a burst, by number of replicas.
    """
    entry = resolve_model(settings.model)
    card, names = entry.card, {count: f"replicas-{count}" for count in requests}
    models = {name: {"replicas": {"min_replicas": n, "max_replicas": n}} for n, name in names.items()}
    async with serving(entry, models, threads=settings.threads, import_path=import_path) as sides:

        async def send(count: int, num_requests: int) -> list[Record]:
            arrivals = draw_arrivals(mix, rate_hz=None, count=num_requests, seed=1, max_duration_s=card.max_duration_s)
            return await play_clips(sides[names[count]], arrivals, sample_rate_hz=card.sample_rate_hz)

        async def measure(count: int) -> dict[str, Any]:
            records, watch = await in_quiet(lambda: send(count, requests[count]))
            return {
                "capacity_rps": capacity_rps(records),
                "cpu_ms_per_request": 1000.0 * watch.own_s / len(records),  # of server and client together
                "foreign_cores": watch.foreign_cores,
            }

        for count in requests:  # warm-up: opens the connections to all replicas
            await send(count, count * _WARM_UP_PER_REPLICA)
        bursts = [{count: await measure(count) for count in requests} for _ in range(settings.rounds)]
    return {
        "requests": requests,
        **summarize_bursts(bursts),
        **describe_quiet([Watch(0.0, burst["foreign_cores"]) for one in bursts for burst in one.values()]),
        "rounds": bursts,
    }


def summarize_bursts(rounds: Sequence[Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Returns the worst round's figures, by number of replicas. `rounds` has a burst for each number of replicas."""
    over_one: dict[str, Any] = {}  # capacity over the capacity of one replica in the same round
    for count in rounds[0]:
        if count > 1:
            ratios = [one[count]["capacity_rps"] / one[1]["capacity_rps"] for one in rounds]
            over_one |= worst(str(count), ratios, larger_is_better=True)
    cpu_ms = {str(count): max(one[count]["cpu_ms_per_request"] for one in rounds) for count in rounds[0]}
    return {"worst_capacity_over_one": over_one, "worst_cpu_ms_per_request": cpu_ms}


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """Returns a table with one row for each number of replicas."""
    return [
        {
            "side": side.replace("_", "-"),
            "replicas": count,
            "capacity over one": results[side]["worst_capacity_over_one"][count],
            "processor time per request (ms)": cpu_ms,
        }
        for side in ("stand_in", "model")
        for count, cpu_ms in results[side]["worst_cpu_ms_per_request"].items()
        if count in results[side]["worst_capacity_over_one"]
    ]
