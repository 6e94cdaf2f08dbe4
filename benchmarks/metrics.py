"""What a run means: pure functions from times to figures. Every latency is in milliseconds and says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Latency:
    """Percentiles of one side's latencies."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float


@dataclass(frozen=True, slots=True)
class Finished:
    """One finished request on the run's clock, in seconds."""

    due_at: float  # when it should have been sent, not when the client got round to it
    ended_at: float
    audio_s: float

    @property
    def latency_ms(self) -> float:
        """From the scheduled arrival to the last byte."""
        return (self.ended_at - self.due_at) * 1000.0


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the closest ranks; `share` in 0..1. Raises ValueError without values."""
    if not values:
        raise ValueError("a percentile needs values")
    ordered = sorted(values)
    rank = share * (len(ordered) - 1)
    low, high = math.floor(rank), math.ceil(rank)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def summarize(latencies_ms: Sequence[float]) -> Latency:
    """The usual percentiles."""
    return Latency(
        p50_ms=percentile(latencies_ms, 0.5),
        p95_ms=percentile(latencies_ms, 0.95),
        p99_ms=percentile(latencies_ms, 0.99),
        mean_ms=sum(latencies_ms) / len(latencies_ms),
    )


def steady(finished: Sequence[Finished], *, head: float = 0.15, tail: float = 0.05) -> list[Finished]:
    """Without the first 15 % and the last 5 % by arrival; everything when that would leave nothing."""
    ordered = sorted(finished, key=lambda request: request.due_at)
    kept = ordered[math.floor(head * len(ordered)) : len(ordered) - math.floor(tail * len(ordered))]
    return kept or ordered


def throughput_rps(finished: Sequence[Finished]) -> float:
    """Requests per second from the first arrival to the last end."""
    return len(finished) / _span_s(finished)


def audio_s_per_s(finished: Sequence[Finished]) -> float:
    """Seconds of audio made per second."""
    return sum(request.audio_s for request in finished) / _span_s(finished)


def worst_ratio(pairs: Sequence[tuple[float, float]], *, larger_is_better: bool) -> float:
    """Ratio ours / theirs of the worse round. Raises ValueError without rounds."""
    ratios = [ours / theirs for ours, theirs in pairs]
    return min(ratios) if larger_is_better else max(ratios)


def _span_s(finished: Sequence[Finished]) -> float:
    if not finished:
        raise ValueError("a rate needs at least one finished request")
    span_s = max(request.ended_at for request in finished) - min(request.due_at for request in finished)
    return max(span_s, 1e-9)
