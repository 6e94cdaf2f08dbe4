"""The benchmarks of a GPU, without one: what is kept and continued, what traces and times mean. That all parts run is
in tests/test_bare_machine.py.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.compare.playing import Record as Played
from benchmarks.gpu import mixes, watched
from benchmarks.gpu.lone import summarize
from benchmarks.gpu.mixes import MixRun, times_alone_ms
from benchmarks.gpu.precision import measure_error
from benchmarks.gpu.published import CLIPS, ClipRow
from benchmarks.gpu.record import Measurement, Record
from benchmarks.gpu.subjects import Bench as Machine
from benchmarks.gpu.subjects import Sizes
from benchmarks.gpu.tracing import Span, StepWatch, Trace, read_trace, top_kernels
from benchmarks.simulate.roofline import MEDIUM, OPEN, SMALL
from stable_audio_serve.engine import Engine, EngineOptions
from tests.engine.test_step import RecordingDevice
from tests.factories import ToyModel, make_request

ENVIRONMENT = {"commit": "c", "gpu": "g", "cpu": "x", "versions": {"torch": "2"}, "settings": {"device": "cuda:0"}}


class Bench:
    """Measurements of ten seconds each, on a clock that only they move."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now_s = 0.0
        self.ran: list[str] = []

    def measure(self, name: str) -> dict[str, Any]:
        self.now_s += 10.0
        self.ran.append(name)
        return {"value": len(self.ran)}

    def start(
        self, names: str = "abc", *, budget_s: float = 1e9, measure: Callable[[str], dict[str, Any]] | None = None
    ) -> list[str]:
        self.ran = []
        run = measure or self.measure
        record = Record(self.path, environment=ENVIRONMENT)
        listed = [Measurement(name, lambda name=name: run(name), about_s=10.0) for name in names]  # type: ignore[misc]
        left = record.run(
            listed,
            summarize=lambda done: {"finished": len(done)},
            budget_s=budget_s,
            clock=lambda: self.now_s,
            say=lambda line: None,
        )
        self.results = json.loads(self.path.read_text())["results"]
        return left


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "out" / "part.json")


def test_nothing_starts_that_would_end_after_the_time_is_up_and_the_next_start_goes_on(bench: Bench) -> None:
    assert bench.start(budget_s=25.0) == ["c"]
    assert bench.ran == ["a", "b"]
    assert (bench.results["left"], bench.results["finished"]) == (["c"], 2)
    assert bench.start(budget_s=25.0) == []
    assert bench.ran == ["c"]
    assert bench.results["left"] == []
    assert list(bench.results["measurements"]) == ["a", "b", "c"]


def test_a_start_always_measures_something(bench: Bench) -> None:
    assert bench.start(budget_s=1.0) == ["b", "c"]
    assert bench.start(budget_s=1.0) == ["c"]


def test_what_was_finished_outlives_an_interruption(bench: Bench) -> None:
    def interrupt(name: str) -> dict[str, Any]:
        if name == "b":
            raise KeyboardInterrupt
        return bench.measure(name)

    with pytest.raises(KeyboardInterrupt):
        bench.start(measure=interrupt)
    kept = json.loads(bench.path.read_text())["results"]
    assert (list(kept["measurements"]), kept["left"]) == (["a"], ["b", "c"])
    bench.start()
    assert bench.ran == ["b", "c"]


def test_a_failure_is_told_the_others_run_and_it_is_tried_again(bench: Bench) -> None:
    def fail(name: str) -> dict[str, Any]:
        if name == "b":
            raise RuntimeError("out of memory")
        return bench.measure(name)

    bench.start(measure=fail)
    assert bench.ran == ["a", "c"]
    assert bench.results["failed"] == {"b": "RuntimeError: out of memory"}
    bench.start()
    assert bench.ran == ["b"]
    assert bench.results["failed"] == {}


def test_another_commits_file_is_refused(bench: Bench) -> None:
    bench.start("a")
    with pytest.raises(ValueError, match="commit"):
        Record(bench.path, environment={**ENVIRONMENT, "commit": "another"})
    with pytest.raises(ValueError, match="torch"):
        Record(bench.path, environment={**ENVIRONMENT, "versions": {"torch": "3"}})


def event(name: str, category: str, *, ts: float, dur: float) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": category, "ts": ts, "dur": dur}


def test_a_device_is_busy_while_anything_runs_on_it() -> None:
    trace = read_trace(
        [
            event("gemm", "kernel", ts=100, dur=10),
            event("Memcpy HtoD (Pageable -> Device)", "gpu_memcpy", ts=105, dur=10),  # beside the first for 5 us
            event("gemm", "kernel", ts=120, dur=2),
            event("softmax", "kernel", ts=121, dur=9),
            event("step", "gpu_user_annotation", ts=0, dur=1000),
            event("cudaLaunchKernel", "cuda_runtime", ts=90, dur=3),
            event("cudaStreamSynchronize", "cuda_runtime", ts=93, dur=30),
            event("cudaMemcpyAsync", "cuda_runtime", ts=93, dur=1),
            {"ph": "M", "name": "process_name"},
        ]
    )
    assert (trace.busy_us, trace.span_us) == (25.0, 30.0)
    assert (trace.launches, trace.copies_to_device, trace.waits) == (3, 1, 1)
    first = top_kernels([trace])[0]
    assert (first["name"], first["calls"], first["total_ms"]) == ("gemm", 2, 0.012)
    assert first["share"] == pytest.approx(12 / 31)


def test_the_kind_of_attention_is_read_from_its_operator() -> None:
    operators = Counter(
        {"aten::_scaled_dot_product_cudnn_attention": 20, "aten::scaled_dot_product_attention": 20, "aten::mm": 5}
    )
    assert Trace([], Counter(), operators).attention == {"cudnn": 20}


def test_without_a_device_the_outermost_operators_are_its_work() -> None:
    trace = read_trace(
        [
            event("aten::linear", "cpu_op", ts=0, dur=10),
            event("aten::addmm", "cpu_op", ts=1, dur=8),
            event("aten::silu", "cpu_op", ts=12, dur=4),
        ]
    )
    assert trace.spans == [Span("aten::linear", "operator", 0, 10), Span("aten::silu", "operator", 12, 16)]
    assert (trace.counted, trace.launches) == ("operator", 2)


def test_gaps_are_only_between_steps_that_follow_each_other() -> None:
    watch = StepWatch(torch.device("cpu"), skip=1, steps=4, per_trace=2)
    watch.step_begins()  # not armed: a warm-up
    watch.step_ends()
    watch.armed.set()
    for number in range(20):
        if number == 3:
            watch.something_else()  # a decode between the third and the fourth
        watch.step_begins()
        torch.zeros(4).add_(1)
        watch.step_ends()
    assert watch.finished.is_set()
    assert len(watch.gaps_ms()) == 2  # four steps are taken, the decode is between two of them
    assert watch.steps_in_traces == [2, 2]
    assert all(trace.launches >= 2 for trace in watch.traces)


async def test_captured_steps_are_watched_and_capturing_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    device = RecordingDevice()
    monkeypatch.setattr(watched, "open_device", lambda *_, **__: device)
    watch = StepWatch(torch.device("cpu"), skip=0, steps=3, per_trace=3)
    model = watched.WatchedModel(ToyModel(), watch)
    options = EngineOptions(mode="strict", warmup_budget_s=0.0, torch_threads=1)
    async with Engine(model, options, device=watched.watch_device(model, watch)) as engine:
        await engine.generate(make_request(duration_s=1.0, steps=8))
        await asyncio.sleep(0.3)  # it captures the step while it is idle
        watch.armed.set()
        replays = device.num_replays
        await engine.generate(make_request(duration_s=1.0, steps=8))
    assert watch.finished.is_set()
    assert device.num_replays - replays == 8
    assert len(watch.gaps_ms()) == 2
    assert watch.steps_in_traces == [3]


def test_errors_are_told_in_decibels() -> None:
    expected = torch.tensor([1.0, 0.0], dtype=torch.float64)
    error = measure_error(torch.tensor([1.0, 0.1], dtype=torch.float64), expected)
    assert error["db"] == pytest.approx(20.0)
    assert error["cosine"] == pytest.approx(1.01**-0.5)
    assert error["largest_share"] == pytest.approx(0.1)
    assert measure_error(torch.tensor([1.0, torch.nan]), expected)["db"] is None


def test_behind_a_lock_a_request_takes_from_the_end_of_the_one_before() -> None:
    ends = {0: 2.0, 2: 2.5, 1: 4.0}
    records = [Played(index, 0.0, ended_at, 1.0, 8, {}) for index, ended_at in ends.items()]
    assert times_alone_ms(records) == pytest.approx({0: 2000.0, 2: 500.0, 1: 1500.0})


def test_the_first_list_of_a_mix_in_a_process_is_expected_to_take_longer() -> None:
    runs = [MixRun("small-8", "small", 5.0, eager_s=8.0), MixRun("small-mixed", "small", 12.0)]
    bench = Machine(torch.device("cuda"), Sizes(rounds=2))
    done = {f"small-8 {name}": {} for name in ("pilot", "burst 1", "replay 1")}
    fresh, resumed = (
        {one.name: one.about_s for one in mixes.measurements(bench, known, runs=runs)} for known in ({}, done)
    )
    assert {name: (fresh[name], resumed[name]) for name in fresh if fresh[name] != resumed[name]} == {
        "small-8 burst 1": (30.0, 15.0),
        "small-8 burst 2": (15.0, 30.0),
    }
    bench.close()


def test_a_pipeline_is_compared_with_the_published_row_of_its_clip() -> None:
    done = {
        "small 5 s": {"pipeline_ms": 34.0, "engine_ms": 35.0, "engine_over_bare_ratio": 35 / 34},
        "medium 30 s": {"pipeline_ms": 75.0, "engine_ms": 70.0, "engine_over_bare_ratio": 70 / 75},
        "open 47 s": {"pipeline_ms": 9000.0, "engine_ms": 8000.0, "engine_over_bare_ratio": 8 / 9},
    }
    figures = summarize(done)
    assert figures["lone_pipeline_over_tensorrt_ratio"] == {"small 5 s": 2.0, "medium 30 s": 1.5}
    assert figures["lone_pipeline_over_tensorrt_worst_ratio"] == 2.0
    assert figures["lone_engine_added_ms"]["small 5 s"] == pytest.approx(1.0)
    assert figures["lone_engine_over_allowed_worst_ratio"] == pytest.approx(35 / (34 * 1.03))  # 35.02 ms are allowed


@pytest.mark.parametrize("row", CLIPS, ids=lambda row: row.name)
def test_the_work_of_a_clip_is_that_of_its_network(row: ClipRow) -> None:
    network, guided, steps = {"small": (SMALL, 1, 8), "medium": (MEDIUM, 1, 8), "open": (OPEN, 2, 100)}[row.model]
    frames = network.frames(row.duration_s)
    step = guided * network.step_operations(frames, is_cached=False) / 1e12
    assert row.step_tflop == pytest.approx(step, rel=0.01)
    assert row.clip_tflop == pytest.approx(steps * step + network.decode_operations(frames) / 1e12, rel=0.05)
    assert row.ideal_ms >= 0.99 * row.clip_tflop / 790 * 1000
