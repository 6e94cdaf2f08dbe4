"""Parts 3 and 4: our engine against a lock and static batches in one process, on the same arrival lists: capacity when
everything comes at once, latency at 0.8 x the lock's capacity, goodput by bisection, and capacity against a lock that
captures nothing. Lists are as long as the time allows; how long, the results say. Before it is measured, every side
has seen a list of the mix and captured what it wants to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

from benchmarks.arrivals import ArrivalList, draw_arrivals
from benchmarks.compare.asking import InProcess
from benchmarks.compare.figures import Bracket, capacity_rps, is_good, mean_stages_ms
from benchmarks.compare.outputs import LARGEST_HALF_DIFFERENCE, difference
from benchmarks.compare.playing import Record, play
from benchmarks.compare.summary import summarize_sides
from benchmarks.gpu.record import Done, Measurement
from benchmarks.gpu.subjects import Bench

SIDES = ("lock", "static", "ours")
EAGER = "eager-lock"
_LOAD_SHARE = 0.8  # of the lock's capacity, while latencies are taken
_GOODPUT_RANGE = (0.2, 1.2)  # of a side's own capacity
_RATIOS = {"capacity": "lock static", "p95": "lock", "p95_8": "lock", "p95_100": "lock", "goodput": "lock static"}


@dataclass(frozen=True, slots=True)
class MixRun:
    """A mix on a model; `run_s` is what one list is expected to take behind a lock, in seconds."""

    mix: str
    model: str
    run_s: float
    eager_s: float | None = None  # what some requests are expected to take if nothing is captured; None: not measured


SMALL = (
    MixRun("equal-5s", "small", 5.0),
    MixRun("small-8", "small", 5.0, eager_s=8.0),
    MixRun("small-mixed", "small", 12.0),
)
MEDIUM = (
    MixRun("medium-8", "medium", 8.0, eager_s=15.0),
    MixRun("medium-mixed", "medium", 35.0),
    MixRun("sao-100", "open", 35.0),
)


def measurements(bench: Bench, done: Done, *, runs: Sequence[MixRun]) -> list[Measurement]:
    """Model by model, which is in memory alone: a pilot of every mix, then round by round, at last goodput."""
    models = [model for model in bench.sizes.models if any(run.model == model for run in runs)]
    return [
        measurement
        for model in models
        for measurement in _of_one_model(bench, done, runs=[run for run in runs if run.model == model])
    ]


def _of_one_model(bench: Bench, done: Done, *, runs: Sequence[MixRun]) -> list[Measurement]:
    sizes = bench.sizes
    found = [
        Measurement(f"{run.mix} pilot", partial(_pilot, bench, run), about_s=15 + (2 + len(SIDES)) * run.run_s)
        for run in runs
    ]
    for number in range(1, sizes.rounds + 1):
        for run in runs:
            about_s = len(SIDES) * run.run_s
            burst = partial(_burst, bench, run, done=done, number=number)
            found.append(Measurement(f"{run.mix} burst {number}", burst, about_s=about_s))
            replay = partial(_replay, bench, run, done=done, number=number)
            found.append(Measurement(f"{run.mix} replay {number}", replay, about_s=about_s / _LOAD_SHARE))
    for run in runs:
        if run.eager_s is not None:
            eager = partial(_burst_eager, bench, run, done=done)
            found.append(Measurement(f"{run.mix} burst {EAGER}", eager, about_s=run.eager_s))
    for side in ("lock", "ours", "static"):
        for run in runs:
            goodput = partial(_goodput, bench, run, done=done, side=side)
            found.append(Measurement(f"{run.mix} goodput {side}", goodput, about_s=sizes.probes * run.run_s))
    return _with_warming(found, done, runs=runs)


def _with_warming(found: Sequence[Measurement], done: Done, *, runs: Sequence[MixRun]) -> list[Measurement]:
    """The first measurement of each mix in this process takes a list of every side longer."""
    longer: dict[str, float] = {}
    for run in runs:
        lists = [one.name for one in found if one.name.startswith(f"{run.mix} ") and one.name not in done]
        first = next((name for name in lists if not name.endswith(("pilot", EAGER))), None)
        if first is not None:
            longer[first] = len(SIDES) * run.run_s
    return [replace(one, about_s=one.about_s + longer.get(one.name, 0.0)) for one in found]


def summarize(done: Done, *, runs: Sequence[MixRun]) -> dict[str, Any]:
    """P1 to P6 by mix, the worse round; void sides are named. Mixes without a whole round are missing."""
    mixes = {run.mix: _summarize_mix(done, run.mix) for run in runs if f"{run.mix} replay 1" in done}
    ratios: dict[str, Any] = {}
    for figure, others in _RATIOS.items():
        for other in others.split():
            ratios[f"{figure}_over_{other}_ratio"] = {
                mix: summary["ratios"]["ours"][other][figure]["worst"]
                for mix, summary in mixes.items()
                if summary["ratios"]["ours"][other].get(figure)
            }
    eager_rps = {run.mix: found["rate_rps"] for run in runs if (found := done.get(f"{run.mix} burst {EAGER}"))}
    over_eager = {
        mix: median(mixes[mix]["sides"]["ours"]["capacity_rps"]) / rate_rps
        for mix, rate_rps in eager_rps.items()
        if mix in mixes
    }
    void_sides = {mix: summary["void_sides"] for mix, summary in mixes.items()}
    return {
        **ratios,
        "capacity_over_eager_lock_ratio": over_eager,
        "is_void": any(void_sides.values()),
        "void_sides": void_sides,
        "mixes": mixes,
    }


def _summarize_mix(done: Done, mix: str) -> dict[str, Any]:
    rounds = [number for number in range(1, 100) if f"{mix} replay {number}" in done]
    pilot = done[f"{mix} pilot"]
    brackets = {
        side: Bracket(found["good_rps"], found["bad_rps"])
        for side in SIDES
        if (found := done.get(f"{mix} goodput {side}"))
    }
    return {
        "requests_per_list": pilot["requests_per_list"],
        "rounds": len(rounds),
        "void_sides": pilot["void_sides"],
        "stages_ms": done[f"{mix} replay {rounds[0]}"]["stages_ms"],
        "captures": done[f"{mix} replay {rounds[-1]}"]["captures"],
        **summarize_sides(
            SIDES,
            bursts=[_read(done[f"{mix} burst {number}"]) for number in rounds],
            replays=[_read(done[f"{mix} replay {number}"]) for number in rounds],
            brackets=brackets,
        ),
    }


def _pilot(bench: Bench, run: MixRun) -> dict[str, Any]:
    """Compare the sides' audio, see every side once, and choose how long the lists are."""
    arrivals = _draw(bench, run, count=4 * bench.sizes.pilot_requests, number=0, rate_hz=None)
    fewest = min(arrivals.step_classes)
    compared = [arrival for arrival in arrivals if arrival.steps == fewest][: bench.sizes.compared_clips]
    clips = {
        side: [bench.run(_asker(bench, run, side=side).ask(arrival)).read() for arrival in compared] for side in SIDES
    }
    differences = {
        side: max(difference(mine, theirs) for mine, theirs in zip(clips[side], clips["lock"], strict=True))
        for side in SIDES
    }
    sizes, pilots = bench.sizes, list(arrivals)[: bench.sizes.pilot_requests]
    for _ in range(sizes.clips_before):
        bench.run(play(_asker(bench, run, side="lock"), pilots))
        bench.settle()
    rate_rps = capacity_rps(bench.run(play(_asker(bench, run, side="lock"), pilots)))
    return {
        "largest_difference": {side: min(value, 1e9) for side, value in differences.items()},  # 1e9: not finite
        "void_sides": [side for side, value in differences.items() if not value <= LARGEST_HALF_DIFFERENCE],
        "lock_rps": rate_rps,
        "requests_per_list": max(sizes.least_requests, min(sizes.most_requests, round(sizes.run_s * rate_rps))),
    }


def _burst(bench: Bench, run: MixRun, *, done: Done, number: int) -> dict[str, Any]:
    """Everything at once."""
    return _play_all(bench, run, number=number, rate_hz=None, done=done)


def _replay(bench: Bench, run: MixRun, *, done: Done, number: int) -> dict[str, Any]:
    """The same list over time."""
    rate_hz = _LOAD_SHARE * capacity_rps(_read(done[f"{run.mix} burst 1"])["lock"])
    return _play_all(bench, run, number=number, rate_hz=rate_hz, done=done)


def _play_all(bench: Bench, run: MixRun, *, number: int, rate_hz: float | None, done: Done) -> dict[str, Any]:
    """Every side in turns, in the other order every second round."""
    count = done[f"{run.mix} pilot"]["requests_per_list"]
    arrivals = _draw(bench, run, count=count, number=number, rate_hz=rate_hz)
    order = SIDES if number % 2 else SIDES[::-1]
    _warm(bench, run, count=count)
    misses = {side: bench.side(run.model, side).captures.num_misses for side in SIDES}
    records: dict[str, list[Record]] = {}
    for side in order:
        records[side] = bench.run(play(_asker(bench, run, side=side), arrivals))
        bench.settle()
    captures = {side: bench.side(run.model, side).captures for side in SIDES}
    return {
        "rate_hz": rate_hz,
        "captures": {
            side: {"captured": own.num_captured, "misses_meanwhile": own.num_misses - misses[side]}
            for side, own in captures.items()
        },
        "stages_ms": {side: mean_stages_ms(records[side]) for side in SIDES},
        "records": {side: _write(records[side]) for side in SIDES},
    }


def _warm(bench: Bench, run: MixRun, *, count: int) -> None:
    """Let every side that is open see the mix once in this process."""
    if run.mix in bench.warmed:
        return
    for side in SIDES:
        bench.run(play(_asker(bench, run, side=side), _draw(bench, run, count=count, number=0, rate_hz=None)))
        bench.settle()
    bench.warmed.add(run.mix)


def _burst_eager(bench: Bench, run: MixRun, *, done: Done) -> dict[str, Any]:
    """The beginning of the first list to a lock that captures nothing."""
    count = done[f"{run.mix} pilot"]["requests_per_list"]
    arrivals = list(_draw(bench, run, count=count, number=1, rate_hz=None))[: bench.sizes.eager_requests]
    asker = _asker(bench, run, side=EAGER)
    bench.run(play(asker, arrivals[:1]))
    return {"rate_rps": capacity_rps(bench.run(play(asker, arrivals))), "requests": len(arrivals)}


def _goodput(bench: Bench, run: MixRun, *, done: Done, side: str) -> dict[str, Any]:
    """The highest rate at which nearly all requests end in five times their time alone, or a second. The time alone is
    that which the lock took for the same request of the first list."""
    burst = _read(done[f"{run.mix} burst 1"])
    alone_ms = times_alone_ms(burst["lock"])
    _warm(bench, run, count=len(burst[side]))
    good_rps, bad_rps = (share * capacity_rps(burst[side]) for share in _GOODPUT_RANGE)
    for _ in range(bench.sizes.probes):
        rate_hz = (good_rps + bad_rps) / 2
        arrivals = _draw(bench, run, count=len(burst[side]), number=1, rate_hz=rate_hz)
        records = bench.run(play(_asker(bench, run, side=side), arrivals))
        bench.settle()
        if is_good(records, alone_ms=lambda record: alone_ms[record.index]):
            good_rps = rate_hz
        else:
            bad_rps = rate_hz
    return {"good_rps": good_rps, "bad_rps": bad_rps}


def times_alone_ms(records: Iterable[Record]) -> Mapping[int, float]:
    """From a burst behind a lock: by index, the time from the end of the request before to its own."""
    times_ms: dict[int, float] = {}
    ended_at = 0.0
    for record in sorted(records, key=lambda record: record.ended_at):
        times_ms[record.index] = (record.ended_at - ended_at) * 1000.0
        ended_at = record.ended_at
    return times_ms


def _asker(bench: Bench, run: MixRun, *, side: str) -> InProcess:
    return InProcess(bench.side(run.model, side), bench.model(run.model).spec.card)


def _draw(bench: Bench, run: MixRun, *, count: int, number: int, rate_hz: float | None) -> ArrivalList:
    """Returns the list of a round; number 0 is the pilot's."""
    sizes, longest_s = bench.sizes, bench.model(run.model).spec.card.max_duration_s
    arrivals = draw_arrivals(run.mix, rate_hz=rate_hz, count=count, seed=number, max_duration_s=1e9)
    return replace(
        arrivals,
        max_duration_s=longest_s,
        arrivals=tuple(
            replace(
                arrival,
                duration_s=min(arrival.duration_s * sizes.duration_share, longest_s),
                steps=min(arrival.steps, sizes.most_steps),
            )
            for arrival in arrivals
        ),
    )


def _write(records: Sequence[Record]) -> list[list[float]]:
    """Records without the stages, whose mean is kept."""
    return [[r.index, r.due_at, round(r.ended_at, 6), r.audio_s, r.steps, r.refused] for r in records]


def _read(measured: Mapping[str, Any]) -> dict[str, list[Record]]:
    return {
        side: [
            Record(
                index=index, due_at=due_at, ended_at=ended_at, audio_s=audio_s, steps=steps, stages_ms={},
                refused=bool(refused),
            )
            for index, due_at, ended_at, audio_s, steps, refused in records
        ]
        for side, records in measured["records"].items()
    }  # fmt: skip
