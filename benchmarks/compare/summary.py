"""The results of a comparison: every side's figures, and each side over each other one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from benchmarks.compare.figures import (
    Bracket,
    Ratio,
    capacity_rps,
    describe_bursts,
    describe_replays,
    ratio_of_brackets,
    ratio_of_medians,
    ratio_of_pooled_p95,
    steady_latencies_ms,
)
from benchmarks.compare.playing import Record

Records = Mapping[str, Sequence[Record]]  # of one round, by side


def summarize_sides(
    sides: Sequence[str], *, bursts: Sequence[Records], replays: Sequence[Records], brackets: Mapping[str, Bracket]
) -> dict[str, Any]:
    """Returns `sides` and `ratios`; `ratios[a][b]` are a's figures over b's."""
    return {
        "sides": {name: _describe(name, bursts=bursts, replays=replays, bracket=brackets.get(name)) for name in sides},
        "ratios": {
            ours: {
                theirs: {
                    name: asdict(ratio) if ratio else None
                    for name, ratio in _compare(ours, theirs, bursts=bursts, replays=replays, brackets=brackets).items()
                }
                for theirs in sides
                if theirs != ours
            }
            for ours in sides
        },
    }


def _describe(
    name: str, *, bursts: Sequence[Records], replays: Sequence[Records], bracket: Bracket | None
) -> dict[str, Any]:
    own = [records[name] for records in replays]
    return {
        **describe_bursts([records[name] for records in bursts]),
        **describe_replays(own, step_classes=_step_classes(own)),
        "goodput": asdict(bracket) if bracket else None,
    }


def _compare(
    ours: str,
    theirs: str,
    *,
    bursts: Sequence[Records],
    replays: Sequence[Records],
    brackets: Mapping[str, Bracket],
) -> dict[str, Ratio | None]:
    """Capacity, p95 of all requests and by steps (`p95_8`), mean latency, goodput."""

    def latencies(name: str, steps: int | None = None) -> list[list[float]]:
        return [steady_latencies_ms(records[name], steps=steps) for records in replays]

    capacities = [[capacity_rps(records[name]) for records in bursts] for name in (ours, theirs)]
    medians = [[median(some) for some in latencies(name)] for name in (ours, theirs)]
    found: dict[str, Ratio | None] = {
        "capacity": ratio_of_medians(*capacities, larger_is_better=True),
        "p50": ratio_of_medians(*medians, larger_is_better=False),
        "p95": ratio_of_pooled_p95(latencies(ours), latencies(theirs)),
    }
    for steps in _step_classes([records[ours] for records in replays]):
        found[f"p95_{steps}"] = ratio_of_pooled_p95(latencies(ours, steps), latencies(theirs, steps))
    if ours in brackets and theirs in brackets:
        found["goodput"] = ratio_of_brackets(brackets[ours], brackets[theirs])
    return found


def _step_classes(rounds: Sequence[Sequence[Record]]) -> tuple[int, ...]:
    return tuple(sorted({record.steps for records in rounds for record in records}))
