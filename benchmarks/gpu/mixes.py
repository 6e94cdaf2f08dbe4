"""Parts 3 and 4 of the GPU benchmarks compare our engine with a lock and with static batches, in one process, like the
benchmark case `run`. They also compare the engine's capacity with that of a lock without CUDA graphs.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

from benchmarks.compare import LARGEST_HALF_DIFFERENCE, Run, RunOptions
from benchmarks.figures import capacity_rps
from benchmarks.gpu.bench import Bench
from benchmarks.load import InProcess, play, play_alone
from benchmarks.pieces import Pieces
from benchmarks.workload import Arrival, draw_arrivals

_SIDES = ("lock", "static", "ours")
_EAGER = "eager-lock"
_PILOTS = 6  # number of requests that are timed alone to choose the length of the lists
_EAGER_REQUESTS = 24  # largest number of requests for the lock without CUDA graphs
_MODELS = {
    "equal-5s": "small",
    "small-8": "small",
    "small-mixed": "small",
    "medium-8": "medium",
    "medium-mixed": "medium",
    "sao-100": "open",
}
SMALL, MEDIUM = tuple(_MODELS)[:3], tuple(_MODELS)[3:]
_MEASURED_EAGER = ("small-8", "medium-8")


async def measure(bench: Bench, pieces: Pieces, *, mixes: tuple[str, ...]) -> dict[str, Any]:
    """Returns the figures for the goals P1 to P6, by mix."""
    attempts = {
        mix: await pieces.attempt(mix, partial(_measure_mix, bench, pieces, mix=mix))
        for mix in mixes
        if _MODELS[mix] in bench.sizes.models
    }
    found = {mix: results for mix, results in attempts.items() if results}
    over_eager = {
        mix: median(results["sides"]["ours"]["capacity_rps"]) / results["eager_lock_rps"]
        for mix, results in found.items()
        if "eager_lock_rps" in results
    }
    return {"capacity_over_eager_lock_ratio": over_eager, "mixes": found}


async def _measure_mix(bench: Bench, pieces: Pieces, *, mix: str) -> dict[str, Any]:
    model, sizes = await bench.model(_MODELS[mix]), bench.sizes
    card = model.spec.card
    askers = {name: InProcess(await bench.side(_MODELS[mix], name)) for name in (*_SIDES, _EAGER)}
    longest_s = min(card.max_duration_s, sizes.most_s)
    pilots = draw_arrivals(mix, rate_hz=None, count=_PILOTS, seed=99, max_duration_s=longest_s)

    async def measure_pilots() -> float:
        for _ in range(sizes.before):
            await play_alone(askers["lock"], pilots)
            await askers["lock"].settle()
        return capacity_rps(await play(askers["lock"], pilots))

    own = Pieces(pieces.folder / f"{mix}-pieces", pieces.about, ends_at=pieces.ends_at)
    lock_rps = await own.take("pilots", measure_pilots)
    count = max(sizes.lists[0], min(sizes.lists[1], round(sizes.list_s * lock_rps)))
    options = RunOptions(
        mix,
        _SIDES,
        max_duration_s=longest_s,
        count=count,
        rounds=sizes.rounds,
        goodput_trials=sizes.trials,
        largest_difference=LARGEST_HALF_DIFFERENCE,
        warms_up=True,
    )
    results = await Run({name: askers[name] for name in _SIDES}, options, pieces=own, is_watched=False).measure()
    if mix in _MEASURED_EAGER:
        burst = draw_arrivals(mix, rate_hz=None, count=count, seed=1, max_duration_s=longest_s)
        eager = partial(_measure_burst, askers[_EAGER], burst[:_EAGER_REQUESTS])
        results["eager_lock_rps"] = await own.take("eager-lock", eager)
    return results


async def _measure_burst(asker: InProcess, arrivals: tuple[Arrival, ...]) -> float:
    await play(asker, arrivals[:1])
    return capacity_rps(await play(asker, arrivals))
