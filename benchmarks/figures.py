"""Computes figures of servers, and ratios with intervals, from records of requests. Latencies are in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from statistics import mean, median
from typing import Any

import numpy as np

from benchmarks.load import Record

_MOST_LATE_SHARE = 0.05  # largest share of late requests for which a rate counts as good
_LONGEST_ALONE = 5.0  # a request is late if it takes more than this many times its time on an idle server
_LEAST_BOUND_MS = 1000.0  # a request that takes at most this time is never late
_HEAD, _TAIL = 0.15, 0.05  # shares of a list's requests, at its start and at its end, that do not count

Records = Mapping[str, Sequence[Record]]  # records of one round, by side


@dataclass(frozen=True, slots=True)
class Ratio:
    """The ratio of two servers' figures, with its interval from `low` to `high`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Bracket:
    """The highest rate at which nearly all requests were in time, and the lowest rate at which too many were late.

    Both are in requests per second. None if no tried rate was good, or if none was bad.
    """

    good_rps: float | None
    bad_rps: float | None


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns a percentile with linear interpolation, or 0 if there are no values."""
    return float(np.percentile(values, percent)) if values else 0.0


def summarize(latencies_ms: Sequence[float]) -> dict[str, float]:
    """Returns the usual percentiles and the mean."""
    p50, p95, p99 = np.percentile(latencies_ms, (50, 95, 99)).tolist()
    return {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "mean_ms": mean(latencies_ms)}


def worst(name: str, rounds: Sequence[float], *, larger_is_better: bool = False) -> dict[str, Any]:
    """Returns a dict with the worst value of all rounds under `name`, and all values under `name` + "_rounds"."""
    return {name: min(rounds) if larger_is_better else max(rounds), f"{name}_rounds": list(rounds)}


def span_s(records: Sequence[Record]) -> float:
    """Returns the time from the first scheduled arrival to the last byte of the last response."""
    return max(1e-9, max(record.ended_at for record in records) - min(record.due_at for record in records))


def capacity_rps(records: Sequence[Record]) -> float:
    """Returns the number of finished requests per second. Refused requests do not count."""
    return sum(record.is_finished for record in records) / span_s(records)


def steady_latencies_ms(records: Sequence[Record], *, steps: int | None = None) -> list[float]:
    """Returns the latencies of finished requests. Requests at the start and at the end of the list do not count.

    If `steps` is given, only requests with this number of steps count.
    """
    ordered = sorted(records, key=lambda record: record.due_at)
    kept = ordered[int(_HEAD * len(ordered)) : len(ordered) - int(_TAIL * len(ordered))] or ordered
    return [record.latency_ms for record in kept if record.is_finished and steps in (None, record.steps)]


def ratio_of_medians(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Returns the median of the ratios of all rounds. The interval is the range of these ratios."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios))


def ratio_of_percentiles(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], *, percent: float
) -> Ratio | None:
    """Returns a percentile of our latencies in all rounds together, divided by the same percentile of theirs.

    The interval covers this ratio and the ratio of each round. Returns None if a round has no latency.
    """
    if not all(ours) or not all(theirs):
        return None
    pooled = percentile([*chain(*ours)], percent) / percentile([*chain(*theirs)], percent)
    rounds = [percentile(a, percent) / percentile(b, percent) for a, b in zip(ours, theirs, strict=True)]
    return Ratio(pooled, min(pooled, *rounds), max(pooled, *rounds))


def ratio_of_brackets(ours: Bracket, theirs: Bracket) -> Ratio | None:
    """Returns our good rate divided by their good rate.

    Each true rate is between the bracket's good and bad rate. The interval covers all ratios of such rates. Returns
    None if one of these rates is unknown.
    """
    if ours.good_rps is None or ours.bad_rps is None or theirs.good_rps is None or theirs.bad_rps is None:
        return None
    good, low, high = (ours.good_rps / theirs.good_rps, ours.good_rps / theirs.bad_rps, ours.bad_rps / theirs.good_rps)
    return Ratio(good, low, high)


def is_good(records: Sequence[Record], *, alone_ms: Callable[[Record], float]) -> bool:
    """Whether at least 95 % of the requests were in time (`is_in_time`)."""
    late = sum(not is_in_time(record, alone_ms=alone_ms(record)) for record in records)
    return late <= _MOST_LATE_SHARE * len(records)


def is_in_time(record: Record, *, alone_ms: float) -> bool:
    """Whether a request finished within `bound_ms`."""
    return record.is_finished and record.latency_ms <= bound_ms(alone_ms)


def bound_ms(alone_ms: float) -> float:
    """Returns a request's latency bound: five times its time on an idle server, or one second if that is longer."""
    return max(_LONGEST_ALONE * alone_ms, _LEAST_BOUND_MS)


def fit_alone_ms(probes: Sequence[Record]) -> Callable[[Record], float]:
    """Returns a function that predicts the time of a request on an idle server.

    The function interpolates, by duration, between probes with the same number of steps.
    """
    by_steps: dict[int, list[tuple[float, float]]] = {}
    for probe in probes:
        by_steps.setdefault(probe.steps, []).append((probe.audio_s, probe.latency_ms))

    def alone_ms(record: Record) -> float:
        durations_s, latencies_ms = zip(*sorted(by_steps[record.steps]), strict=True)
        return float(np.interp(record.audio_s, durations_s, latencies_ms))

    return alone_ms


def summarize_sides(
    sides: Sequence[str], *, bursts: Sequence[Records], replays: Sequence[Records], brackets: Mapping[str, Bracket]
) -> dict[str, Any]:
    """Returns the figures of all compared servers (`sides`), and their ratios.

    `ratios[a][b]` are the figures of server a, each divided by the same figure of server b.
    """
    steps = sorted({record.steps for records in replays for own in records.values() for record in own})
    capacities = {name: [capacity_rps(records[name]) for records in bursts] for name in sides}
    latencies_ms = {
        name: {n: [steady_latencies_ms(records[name], steps=n) for records in replays] for n in (None, *steps)}
        for name in sides
    }

    def describe(name: str) -> dict[str, Any]:
        pooled = {"all" if n is None else str(n): [*chain(*rounds)] for n, rounds in latencies_ms[name].items()}
        return {
            "capacity_rps": capacities[name],
            "refused_at_once": [sum(not record.is_finished for record in records[name]) for records in bursts],
            "num_requests": len(pooled["all"]),
            "refused": sum(not record.is_finished for records in replays for record in records[name]),
            "latency": {key: summarize(values) for key, values in pooled.items() if values},
            "goodput": asdict(brackets[name]) if name in brackets else None,
        }

    def ratios(ours: str, theirs: str) -> dict[str, Any]:
        a, b = latencies_ms[ours], latencies_ms[theirs]
        found: dict[str, Ratio | None] = {
            "capacity": ratio_of_medians(capacities[ours], capacities[theirs]),
            "p50": ratio_of_percentiles(a[None], b[None], percent=50),
            **{f"p95_{n}" if n else "p95": ratio_of_percentiles(a[n], b[n], percent=95) for n in a},
        }
        if ours in brackets and theirs in brackets:
            found["goodput"] = ratio_of_brackets(brackets[ours], brackets[theirs])
        return {name: asdict(ratio) if ratio else None for name, ratio in found.items()}

    return {
        "sides": {name: describe(name) for name in sides},
        "ratios": {ours: {theirs: ratios(ours, theirs) for theirs in sides if theirs != ours} for ours in sides},
    }
