"""The figures and ratios of a benchmark that compares programs, checked against values computed by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.cases import overload, run, scale, simulate
from benchmarks.cases.overload import share_served, summarize_overload
from benchmarks.dialects import OverHttp
from benchmarks.figures import (
    Bracket,
    capacity_rps,
    fit_alone_ms,
    is_good,
    percentile,
    ratio_of_brackets,
    ratio_of_medians,
    ratio_of_percentiles,
    steady_latencies_ms,
    summarize,
    summarize_sides,
    worst,
)
from benchmarks.goals import GOALS, Goal, Standing, read_standings
from benchmarks.gpu.trace import summarize_trace
from benchmarks.load import Answer, Record, RefusedError, play, play_until_served
from benchmarks.models import CaseSettings
from benchmarks.report import write_report
from benchmarks.servers.timed import LinearDevice, TimedReplica
from benchmarks.workload import Arrival
from stable_audio_serve.core.errors import OverloadedError
from stable_audio_serve.core.generation import GenerationResult
from stable_audio_serve.core.settings import ModelSettings, Settings
from tests.factories import make_request
from tests.patience import PATIENCE_S


def record(due_at: float, latency_s: float, *, steps: int = 8, audio_s: float = 1.0, refused: bool = False) -> Record:
    outcome = "refused" if refused else "finished"
    return Record(0, due_at, due_at + latency_s, audio_s, steps, outcome)


class CallbackSide:
    """A compared program that calls the test's function for each request."""

    def __init__(self, ask: Callable[[Arrival], Awaitable[None]]) -> None:
        self._ask = ask

    async def ask(self, arrival: Arrival) -> Answer:
        await self._ask(arrival)
        return Answer({}, 1, lambda: np.zeros((2, 1), dtype=np.float32))

    async def settle(self) -> None:
        """Nothing to wait for."""


async def test_open_loop_arrivals_do_not_wait_for_answers() -> None:
    seeds: list[int] = []
    all_arrived = asyncio.Event()

    async def answer_after_the_last_arrival(arrival: Arrival) -> None:
        seeds.append(arrival.seed)
        if len(seeds) == 3:
            all_arrived.set()
        await all_arrived.wait()

    arrivals = [Arrival(0.02 * seed, "a bell", 1.0, seed=seed, steps=8) for seed in range(3)]
    async with asyncio.timeout(PATIENCE_S):
        records = await play(CallbackSide(answer_after_the_last_arrival), arrivals)
    assert seeds == [0, 1, 2]
    assert [one.due_at for one in records] == [0.0, 0.02, 0.04]
    assert records[0].latency_ms >= 40.0  # answered only after the last arrival, at 40 ms


async def test_clients_retry_after_the_requested_time() -> None:
    asked: list[int] = []

    async def refuse_twice(arrival: Arrival) -> None:
        asked.append(arrival.seed)
        if asked.count(1) < 3 and arrival.seed == 1:
            raise RefusedError("full", retry_after_s=0.05)
        if arrival.seed == 2:
            raise RuntimeError("broken")

    arrivals = [Arrival(0.0, "a bell", 1.0, seed=seed, steps=8) for seed in (1, 2)]
    first, second = await play_until_served(CallbackSide(refuse_twice), arrivals)
    assert [one.outcome for one in first] == ["refused", "refused", "finished"]
    assert first[1].due_at == pytest.approx(first[0].ended_at + 0.05)
    assert [one.outcome for one in second] == ["failed"]
    assert share_served([first, second]) == 0.5


@pytest.mark.parametrize(
    ("headers", "retry_after_s"),
    [({"Retry-After": "2"}, 2.0), ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, None), ({}, None)],
)
async def test_a_refusal_may_have_a_date_or_no_time(headers: dict[str, str], retry_after_s: float | None) -> None:
    refuse = httpx.MockTransport(lambda _: httpx.Response(429, headers=headers))
    async with httpx.AsyncClient(transport=refuse, base_url="http://server") as client:
        (refused,) = await play(OverHttp([client]), [Arrival(0.0, "a bell", 1.0, seed=1, steps=8)])
    assert (refused.outcome, refused.retry_after_s) == ("refused", retry_after_s)


def test_percentiles_interpolate() -> None:
    assert percentile([10.0, 20.0], 50) == 15.0
    latency = summarize([float(value) for value in range(101)])
    assert list(latency.values()) == pytest.approx([50.0, 95.0, 99.0, 50.0])


def test_the_worse_round_counts() -> None:
    assert worst("speed", [2.0, 1.5], larger_is_better=True) == {"speed": 1.5, "speed_rounds": [2.0, 1.5]}
    assert worst("time", [2.0, 1.5]) == {"time": 2.0, "time_rounds": [2.0, 1.5]}


def test_figures_by_hand() -> None:
    assert capacity_rps([record(0.0, 1.0), record(0.0, 2.0), record(0.0, 4.0)]) == 0.75
    listed = [record(float(i), 0.1 * (i + 1), steps=8 if i % 2 else 50) for i in range(20)]
    kept = steady_latencies_ms(listed)
    # The first 15 % and the last 5 % are left out.
    assert kept == pytest.approx([100.0 * (i + 1) for i in range(3, 19)])
    assert steady_latencies_ms(listed, steps=50) == pytest.approx([100.0 * (i + 1) for i in range(4, 19, 2)])
    assert steady_latencies_ms(listed[:1]) == pytest.approx([100.0])
    capacity = ratio_of_medians([3.0, 4.0, 9.0], [2.0, 2.0, 3.0])
    assert (capacity.value, capacity.low, capacity.high) == (2.0, 1.5, 3.0)
    p95 = ratio_of_percentiles([[1.0, 1.0], [2.0, 2.0]], [[2.0, 2.0], [2.0, 2.0]], percent=95)
    assert p95 is not None
    assert (p95.value, p95.low, p95.high) == (1.0, 0.5, 1.0)
    assert ratio_of_percentiles([[], [1.0]], [[1.0], [1.0]], percent=95) is None
    goodput = ratio_of_brackets(Bracket(2.0, 2.5), Bracket(1.0, 1.25))
    assert goodput is not None
    assert (goodput.value, goodput.low, goodput.high) == (2.0, 1.6, 2.5)
    assert ratio_of_brackets(Bracket(2.0, None), Bracket(1.0, 1.25)) is None


def test_refused_requests_count_neither_as_work_nor_as_latency() -> None:
    burst = [record(0.0, 1.0), record(0.0, 0.01, refused=True), record(0.0, 4.0), record(0.0, 0.01, refused=True)]
    assert capacity_rps(burst) == 0.5
    assert steady_latencies_ms(burst) == [1000.0, 4000.0]
    rounds = [{"lock": burst}]
    side = summarize_sides(("lock",), bursts=rounds, replays=rounds, brackets={})["sides"]["lock"]
    assert (side["num_requests"], side["refused"], side["refused_at_once"]) == (2, 2, [2])


def test_a_side_may_refuse_every_steady_request() -> None:
    lock = [record(float(i), 0.1) for i in range(20)]
    full = [record(float(i), 0.1, refused=i > 0) for i in range(20)]
    rounds = [{"lock": lock, "full": full}]
    results = summarize_sides(("lock", "full"), bursts=rounds, replays=rounds, brackets={})
    assert {name: results["ratios"]["full"]["lock"][name] for name in ("p50", "p95")} == {"p50": None, "p95": None}
    row = run.rows(results | {"reference": "lock"})[1]
    assert (row["p50 (ms)"], row["p95 (ms)"], row["refused"]) == ("", "", 38)


def test_a_rate_is_good_if_19_of_20_requests_end_in_time() -> None:
    alone_ms = fit_alone_ms([record(0, 0.1, audio_s=1.0), record(0, 0.5, audio_s=5.0)])
    assert alone_ms(record(0, 9.0, audio_s=3.0)) == pytest.approx(300.0)
    # A request is in time if it takes at most 1 s, or at most five times its time on an idle server, whichever is
    # longer. The request that takes 1.4 s needs 0.3 s on an idle server, so it is in time. The request below that takes
    # 1.1 s needs 0.1 s on an idle server, so it is late.
    in_time = [record(0, 0.9, audio_s=1.0)] * 18 + [record(0, 1.4, audio_s=3.0)]
    assert is_good([*in_time, record(0, 1.1, audio_s=1.0)], alone_ms=alone_ms)
    assert is_good([*in_time, record(0, 0.0, refused=True)], alone_ms=alone_ms)
    assert not is_good([*in_time, record(0, 1.1, audio_s=1.0), record(0, 0.0, refused=True)], alone_ms=alone_ms)


def test_goodput_counts_on_time_requests_until_the_last_arrival() -> None:
    # Four requests, which arrive at 0, 1, 2 and 3 s: on time, late, refused, and finished after the last arrival.
    records = [record(0.0, 0.5), record(1.0, 1.6), record(2.0, 0.01, refused=True), record(3.0, 0.5)]
    figures = summarize_overload(records, work_ms=[100.0] * 4, peak_work_ms_per_s=100.0)
    assert figures["goodput_over_peak_ratio"] == pytest.approx(1 / 3)


def overload_figures(*, peak_work_ms_per_s: float, refused: bool) -> dict[str, Any]:
    """Returns the figures of one round of the case `overload`."""
    records = [record(0.0, 0.5), record(1.0, 0.01, refused=refused)]
    figures = summarize_overload(records, work_ms=[100.0] * 2, peak_work_ms_per_s=peak_work_ms_per_s)
    return figures | {"normal_after_s": 1.0, "served_within_four_tries_share": share_served([records[:1]])}


def standings_of(folder: Path, case: str, results: Mapping[str, Any]) -> dict[str, str]:
    """Returns the verdicts on the results of a case, by the name of the figure."""
    write_report(folder, case, settings={}, results=results)
    found = read_standings(folder, [goal for goal in GOALS if goal.case == case])
    return {".".join(standing.goal.path[1:]): standing.verdict for standing in found}


def test_refusals_are_not_measured_if_nothing_is_refused(tmp_path: Path) -> None:
    results = {"model": overload.worst_of([overload_figures(peak_work_ms_per_s=100.0, refused=False)])}
    verdicts = standings_of(tmp_path, "overload", results)
    assert {verdicts[f"worst_refusal_{percent}_ms"] for percent in ("p50", "p99")} == {"not measured"}
    assert verdicts["worst_normal_after_s"] == "ok"
    (row,) = overload.rows(results)
    assert row["refusals p50 (ms)"] == row["refusals p99 (ms)"] == "not measured"
    mixed = [overload_figures(peak_work_ms_per_s=100.0, refused=refused) for refused in (False, True)]
    assert overload.worst_of(mixed)["worst_refusal_p50_ms"] == pytest.approx(10.0)


async def test_one_bad_round_does_not_miss_a_goal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = [overload_figures(peak_work_ms_per_s=work, refused=True) for work in (100.0, 1000.0)]
    verdicts = standings_of(tmp_path, "overload", {"model": overload.worst_of(rounds)})
    assert verdicts["worst_goodput_over_peak_ratio"] == "close"

    scaled = scale.compare_capacities([{1: 1.0, 2: 2.0}, {1: 1.0, 2: 1.0}])
    results = {"stand_in": scaled, "model": scaled}
    assert standings_of(tmp_path, "scale", results)["worst_capacity_over_one.2"] == "close"
    assert [row["replicas"] for row in scale.rows(results)] == ["2", "2"]

    ratios = iter([1.0, 2.0, 3.0] * 2)  # for each seed, in both mixes
    monkeypatch.setattr(simulate, "_compare", lambda *_, **__: {"capacity_over_lock_ratio": next(ratios)})
    verdicts = standings_of(tmp_path, "simulate", await simulate.measure(CaseSettings()))
    assert verdicts["small-mixed.packed.capacity_over_lock_ratio"] == "close"


def test_a_goal_is_missed_by_its_whole_interval() -> None:
    goal = Goal("P4", "p95", "run", (), 0.7)
    assert Standing(goal).verdict == "not measured"
    assert [Standing(goal, 0.8, low, 0.9).verdict for low in (0.65, 0.75)] == ["close", "MISS"]
    assert Standing(goal, 0.6, 0.5, 0.9).verdict == "ok"
    assert Standing(goal, 0.6, 0.5, 0.9, is_void=True).verdict == "void"


def test_a_trace_is_busy_while_anything_runs() -> None:
    def event(name: str, start_us: float, took_us: float, *, kind: str = "kernel") -> dict[str, object]:
        return {"ph": "X", "cat": kind, "name": name, "ts": start_us, "dur": took_us}

    figures = summarize_trace(
        [
            event("gemm", 0.0, 40.0),
            event("norm", 20.0, 30.0),  # overlaps "gemm", so the overlap must count once
            event("Memcpy HtoD", 80.0, 20.0, kind="gpu_memcpy"),
            event("cudaLaunchKernel", 0.0, 1.0, kind="cuda_runtime"),
            event("cudaMemcpyAsync", 0.0, 1.0, kind="cuda_runtime"),
            event("cudaStreamSynchronize", 0.0, 1.0, kind="cuda_runtime"),
        ]
    )
    assert figures["busy_share"] == pytest.approx(0.7)
    assert [figures[name] for name in ("kernels", "host_launches", "waits", "copies_to_device")] == [2, 1, 1, 1]
    assert summarize_trace([])["busy_share"] is None


def test_pauses_within_a_cuda_graph_are_not_gaps_of_the_host() -> None:
    def kernel(start_us: float, call: int) -> dict[str, object]:
        return {"ph": "X", "cat": "kernel", "name": "k", "ts": start_us, "dur": 10.0, "args": {"correlation": call}}

    def launch(call: int) -> dict[str, object]:
        return {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0.0, "args": {"correlation": call}}

    graphs = [kernel(0.0, 1), kernel(50.0, 1), kernel(80.0, 9), kernel(100.0, 2), kernel(150.0, 2), kernel(260.0, 3)]
    figures = summarize_trace([*graphs, launch(1), launch(2), launch(3)])
    assert figures["host_gap_ms"] == pytest.approx(0.065)  # of 30 us (without the eager kernel 9) and 100 us
    assert figures["idle_ms"] == pytest.approx(0.21)
    assert summarize_trace(graphs)["host_gap_ms"] is None


async def test_a_timed_replica_runs_one_request_at_a_time() -> None:
    model = ModelSettings(name="demo", max_queue_s=0.6)
    replica = TimedReplica(Settings(models=(model,)), model)
    replica.times = LinearDevice(text_ms=400.0, step_ms=0.0, step_per_frame_ms=0.0, decode_ms=0.0)  # type: ignore[misc]
    first, second, third = await asyncio.gather(*(replica.generate(make_request(duration_s=0.1)) for _ in range(3)))
    assert isinstance(first, GenerationResult)
    assert isinstance(second, GenerationResult)
    assert second.timings.queue_ms >= 200.0 > first.timings.queue_ms  # type: ignore[union-attr]
    assert first.audio[0].shape == (2, 4410)
    assert isinstance(third, OverloadedError)
    assert 0.0 < third.retry_after_s <= 0.25  # type: ignore[operator]
