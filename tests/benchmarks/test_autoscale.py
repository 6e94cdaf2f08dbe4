"""How the case counts replicas and compares two policies, by hand."""

from __future__ import annotations

import pytest

from benchmarks.cases.autoscale import Count, Side, summarize_rounds


def test_replicas_count_between_two_times_each_sample_until_the_next() -> None:
    count = Count([(0.0, 1), (10.0, 3), (20.0, 2)])
    assert count.replica_s(start=0.0, end=30.0) == 10 + 30 + 20
    assert count.replica_s(start=5.0, end=22.0) == 5 + 30 + 4
    assert count.replica_s(start=25.0, end=26.0) == 2
    assert Count([(1.0, 4)]).replica_s(start=2.0, end=4.0) == 8


def side(p95_ms: float, replica_s: float) -> Side:
    return Side(1.0, p95_ms, p95_ms, 1.0, replica_s, most_replicas=3, client_late_p95_ms=0.0)


def test_the_worse_round_counts_for_each_figure() -> None:
    found = summarize_rounds(
        [
            {"work": side(500.0, 90.0), "serve": side(1000.0, 100.0)},
            {"work": side(700.0, 80.0), "serve": side(1000.0, 100.0)},
        ]
    )
    assert found["p95_over_serve_ratio"] == pytest.approx(0.7)
    assert found["replica_s_over_serve_ratio"] == pytest.approx(0.9)
