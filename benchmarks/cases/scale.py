"""Measures the capacity of 1, 2, 4 ... replicas with bursts of requests over HTTP.

One server has a model for each number of replicas. The device of a simulated replica is only a clock, so that many
replicas fit on two cores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.figures import capacity_rps, worst
from benchmarks.load import Record, describe_quiet, in_quiet, play_clips
from benchmarks.models import CaseSettings, resolve_model
from benchmarks.servers.process import serving
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

        for count in requests:  # warm-up: opens the connections to all replicas
            await send(count, count * _WARM_UP_PER_REPLICA)
        foreign_cores: list[float] = []
        rounds: list[dict[int, float]] = []
        for _ in range(settings.rounds):
            rounds.append({})
            for count, num_requests in requests.items():
                records, foreign = await in_quiet(partial(send, count, num_requests))
                rounds[-1][count] = capacity_rps(records)
                foreign_cores.append(foreign)
    return {"requests": requests, **compare_capacities(rounds), **describe_quiet(foreign_cores), "rounds": rounds}


def compare_capacities(rounds: Sequence[Mapping[int, float]]) -> dict[str, Any]:
    """Returns the capacities divided by that of one replica in the same round, by number of replicas: the worst round.

    `rounds` has the capacity, by number of replicas, in each round.
    """
    over_one: dict[str, Any] = {}
    for count in rounds[0]:
        if count > 1:
            over_one |= worst(str(count), [one[count] / one[1] for one in rounds], larger_is_better=True)
    return {"worst_capacity_over_one": over_one}


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """Returns a table with one row for each number of replicas."""
    return [
        {"side": side.replace("_", "-"), "replicas": count, "capacity over one": ratio}
        for side in ("stand_in", "model")
        for count, ratio in results[side]["worst_capacity_over_one"].items()
        if count.isdecimal()  # not the list of all rounds
    ]
