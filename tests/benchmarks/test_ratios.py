"""Ratios of two sides that were measured in one run, worked out by hand."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from benchmarks.arrivals import Arrival
from benchmarks.compare.asking import Answer
from benchmarks.compare.figures import (
    Bracket,
    capacity_rps,
    describe_bursts,
    describe_replays,
    fit_alone_ms,
    is_good,
    ratio_of_brackets,
    ratio_of_medians,
    ratio_of_pooled_p95,
    steady_latencies_ms,
)
from benchmarks.compare.playing import Record, play
from benchmarks.metrics import Finished, percentile, steady, summarize, throughput_rps, worst_ratio
from tests.patience import PATIENCE_S


def record(due_at: float, latency_s: float, *, steps: int = 8, audio_s: float = 1.0, refused: bool = False) -> Record:
    return Record(0, due_at, due_at + latency_s, audio_s, steps, {}, refused)


async def test_open_loop_arrivals_do_not_wait_for_answers() -> None:
    asked: list[int] = []
    are_all_asked = asyncio.Event()

    class AnsweringNobodyBeforeTheLastArrives:
        async def ask(self, arrival: Arrival) -> Answer:
            asked.append(arrival.seed)
            if len(asked) == 3:
                are_all_asked.set()
            await are_all_asked.wait()
            return Answer({}, lambda: np.zeros((2, 1), dtype=np.float32))

    arrivals = [Arrival(0.02 * seed, "a bell", 1.0, seed=seed, steps=8) for seed in range(3)]
    async with asyncio.timeout(PATIENCE_S):
        records = await play(AnsweringNobodyBeforeTheLastArrives(), arrivals)
    assert asked == [0, 1, 2]
    assert [one.due_at for one in records] == [0.0, 0.02, 0.04]
    assert records[0].latency_ms >= 40.0  # it waited for the last arrival, which did not wait for it


def test_percentiles_interpolate() -> None:
    assert percentile([10.0, 20.0], 0.5) == 15.0
    assert percentile([3.0], 0.99) == 3.0
    latency = summarize([float(value) for value in range(101)])
    assert (latency.p50_ms, latency.p95_ms, latency.p99_ms) == pytest.approx((50.0, 95.0, 99.0))
    with pytest.raises(ValueError, match="values"):
        percentile([], 0.5)


def test_the_steady_part_drops_the_ends_but_never_everything() -> None:
    for count in (1, 19, 20, 200):
        kept = steady([Finished(float(i), i + 1.0, 1.0) for i in range(count)])
        assert kept
        if count >= 20:
            assert kept[0].due_at == float(int(0.15 * count))
            assert len(kept) == count - int(0.15 * count) - int(0.05 * count)


def test_throughput_spans_the_first_arrival_to_the_last_end() -> None:
    assert throughput_rps([Finished(0.0, 1.0, 1.0), Finished(1.0, 4.0, 1.0)]) == 0.5
    assert Finished(due_at=1.0, ended_at=3.5, audio_s=2.0).latency_ms == 2500.0


def test_the_worse_round_counts() -> None:
    assert worst_ratio([(4.0, 2.0), (3.0, 2.0)], larger_is_better=True) == 1.5
    assert worst_ratio([(4.0, 2.0), (3.0, 2.0)], larger_is_better=False) == 2.0


def test_figures_by_hand() -> None:
    assert capacity_rps([record(0.0, 1.0), record(0.0, 2.0), record(0.0, 4.0)]) == 0.75
    listed = [record(float(i), 0.1 * (i + 1), steps=8 if i % 2 else 50) for i in range(20)]
    kept = steady_latencies_ms(listed)
    assert kept == pytest.approx([100.0 * (i + 1) for i in range(3, 19)])  # without the first 15 and last 5 %
    assert steady_latencies_ms(listed, steps=50) == pytest.approx([100.0 * (i + 1) for i in range(4, 19, 2)])
    capacity = ratio_of_medians([3.0, 4.0, 9.0], [2.0, 2.0, 3.0], larger_is_better=True)
    assert (capacity.value, capacity.low, capacity.high, capacity.worst) == (2.0, 1.5, 3.0, 1.5)
    p95 = ratio_of_pooled_p95([[1.0, 1.0], [2.0, 2.0]], [[2.0, 2.0], [2.0, 2.0]])
    assert p95 is not None
    assert (p95.value, p95.low, p95.high, p95.worst) == (1.0, 0.5, 1.0, 1.0)
    assert ratio_of_pooled_p95([[], [1.0]], [[1.0], [1.0]]) is None
    goodput = ratio_of_brackets(Bracket(2.0, 2.5), Bracket(1.0, 1.25))
    assert (goodput.value, goodput.low, goodput.high) == (2.0, 1.6, 2.5)


def test_what_was_refused_is_no_work_and_no_latency() -> None:
    burst = [record(0.0, 1.0), record(0.0, 0.01, refused=True), record(0.0, 4.0), record(0.0, 0.01, refused=True)]
    assert capacity_rps(burst) == 0.5
    assert steady_latencies_ms(burst) == [1000.0, 4000.0]
    described = describe_replays([burst], step_classes=(8,))
    assert (described["num_requests"], described["refused"]) == (2, 2)
    assert describe_bursts([burst])["refused_at_once"] == [2]


def test_a_rate_is_good_while_nineteen_of_twenty_end_in_time() -> None:
    alone_ms = fit_alone_ms([record(0, 0.1, audio_s=1.0), record(0, 0.5, audio_s=5.0)])
    assert alone_ms(record(0, 9.0, audio_s=3.0)) == pytest.approx(300.0)
    in_time = [record(0, 0.9, audio_s=1.0)] * 18 + [record(0, 1.4, audio_s=3.0)]  # within a second, within 5 x 0.3 s
    assert is_good([*in_time, record(0, 1.1, audio_s=1.0)], alone_ms=alone_ms)
    assert is_good([*in_time, record(0, 0.0, refused=True)], alone_ms=alone_ms)
    assert not is_good([*in_time, record(0, 1.1, audio_s=1.0), record(0, 0.0, refused=True)], alone_ms=alone_ms)
