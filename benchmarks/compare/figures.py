"""What the records of a comparison mean: pure functions from records to figures and ratios with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

import numpy as np

from benchmarks.compare.playing import Record
from benchmarks.metrics import audio_s_per_s, percentile, steady, summarize

_P95 = 0.95
_MOST_LATE_SHARE = 0.05  # of requests, while a rate still counts as good
_LONGEST_ALONE = 5.0  # times its time alone, or ...
_LEAST_BOUND_MS = 1000.0  # ... this, whichever is longer


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ours over theirs: one value, the lowest and highest it may be, and the worse of the rounds."""

    value: float
    low: float
    high: float
    worst: float


@dataclass(frozen=True, slots=True)
class Bracket:
    """The highest rate that was good and the lowest that was not, in requests per second."""

    good_rps: float
    bad_rps: float


def capacity_rps(records: Sequence[Record]) -> float:
    """Finished requests per second when all came at once; refused ones took time, but are no work done."""
    span_s = max(record.ended_at for record in records) - min(record.due_at for record in records)
    return sum(not record.refused for record in records) / max(span_s, 1e-9)


def steady_latencies_ms(records: Sequence[Record], *, steps: int | None = None) -> list[float]:
    """Latencies of what finished in the steady part of a list; with `steps` only of requests with so many."""
    ordered = sorted(records, key=lambda record: record.due_at)
    due_at = {request.due_at for request in steady([record.finished for record in ordered])}
    return [r.latency_ms for r in ordered if r.due_at in due_at and steps in (None, r.steps) and not r.refused]


def ratio_of_medians(ours: Sequence[float], theirs: Sequence[float], *, larger_is_better: bool) -> Ratio:
    """The median of the rounds' ratios, and their range."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    worst = min(ratios) if larger_is_better else max(ratios)
    return Ratio(median(ratios), min(ratios), max(ratios), worst)


def ratio_of_pooled_p95(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Ratio | None:
    """The p95 over all rounds' latencies together; the interval reaches over that and every round's own ratio.

    None where a round has no such request.
    """
    if not all(ours) or not all(theirs):
        return None
    pooled = percentile([ms for some in ours for ms in some], _P95) / percentile(
        [ms for some in theirs for ms in some], _P95
    )
    rounds = [percentile(a, _P95) / percentile(b, _P95) for a, b in zip(ours, theirs, strict=True)]
    return Ratio(pooled, min(pooled, *rounds), max(pooled, *rounds), max(rounds))


def ratio_of_brackets(ours: Bracket, theirs: Bracket) -> Ratio:
    """Good rate over good rate; the interval is what the brackets leave open."""
    value = ours.good_rps / theirs.good_rps
    return Ratio(value, ours.good_rps / theirs.bad_rps, ours.bad_rps / theirs.good_rps, ours.good_rps / theirs.bad_rps)


def is_good(records: Sequence[Record], *, alone_ms: Callable[[Record], float]) -> bool:
    """Whether at least 95 % finished within five times their time alone, or a second."""
    bounds_ms = [max(_LONGEST_ALONE * alone_ms(record), _LEAST_BOUND_MS) for record in records]
    late = sum(record.refused or record.latency_ms > bound for record, bound in zip(records, bounds_ms, strict=True))
    return late <= _MOST_LATE_SHARE * len(records)


def fit_alone_ms(probes: Sequence[Record]) -> Callable[[Record], float]:
    """Returns a request's time on an idle server, between the probes of as many steps, by duration."""
    by_steps: dict[int, list[tuple[float, float]]] = {}
    for probe in probes:
        by_steps.setdefault(probe.steps, []).append((probe.audio_s, probe.latency_ms))

    def alone_ms(record: Record) -> float:
        durations_s, latencies_ms = zip(*sorted(by_steps[record.steps]), strict=True)
        return float(np.interp(record.audio_s, durations_s, latencies_ms))

    return alone_ms


def describe_replays(rounds: Sequence[Sequence[Record]], *, step_classes: Sequence[int]) -> dict[str, Any]:
    """Percentiles of a side over all rounds, of all requests and by steps, and where the time went."""
    latencies_ms = {"all": [ms for records in rounds for ms in steady_latencies_ms(records)]}
    for steps in step_classes:
        latencies_ms[str(steps)] = [ms for records in rounds for ms in steady_latencies_ms(records, steps=steps)]
    return {
        "num_requests": len(latencies_ms["all"]),
        "refused": sum(record.refused for records in rounds for record in records),
        "latency": {name: asdict(summarize(values)) for name, values in latencies_ms.items() if values},
        "stages_ms": mean_stages_ms([r for records in rounds for r in records if not r.refused]),
    }


def describe_bursts(rounds: Sequence[Sequence[Record]]) -> dict[str, Any]:
    """Capacity of a side by round."""
    return {
        "capacity_rps": [capacity_rps(records) for records in rounds],
        "audio_s_per_gpu_s": [audio_s_per_s([r.finished for r in records if not r.refused]) for records in rounds],
        "refused_at_once": [sum(record.refused for record in records) for records in rounds],
    }


def mean_stages_ms(records: Sequence[Record]) -> Mapping[str, float]:
    """The mean time of each stage that the side named."""
    names = dict.fromkeys(name for record in records for name in record.stages_ms)
    return {name: mean(record.stages_ms.get(name, 0.0) for record in records) for name in names}
