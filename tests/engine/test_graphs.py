"""When CUDA graphs are captured, and in which order. The clock is fake: captures and tests advance it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from stable_audio_serve.engine.hardware import graphs as graphs_module
from stable_audio_serve.engine.hardware.device import DeviceLostError
from stable_audio_serve.engine.hardware.graphs import CallMemory, Graphs, Kind
from tests.engine.capturing import GraphCounts, RecordingDevice
from tests.factories import FakeClock

RATE_MS = 0.1  # a capture takes this many milliseconds per latent frame


@dataclass(frozen=True, slots=True)
class AnyShape:
    size: int
    kind: Kind = "denoise"

    @property
    def num_inputs(self) -> int:
        return self.size

    @property
    def num_outputs(self) -> int:
        return 1


class Bench:
    """The graphs of a fake device whose captures take time. `taken_ms` has the time of each capture, by size."""

    def __init__(self, off_file: Path | None = None) -> None:
        self.clock, self.metrics = FakeClock(), GraphCounts()
        self.taken_ms: dict[int, float] = {}
        self.device = _SlowDevice(self.clock)
        self.graphs = Graphs(self.device, clock=self.clock, metrics=self.metrics, off_file=off_file)

    def run(self, shape: AnyShape, memory: CallMemory) -> None:
        self.taken_ms[shape.size] = RATE_MS * shape.size
        self.clock.now += self.taken_ms[shape.size] / 1000.0

    def ask(self, *sizes: int, times: int = 1, kind: Kind = "denoise") -> list[bool]:
        """Ask `times` times for the graph of each shape. Returns, for each time, whether there was a graph."""
        shapes = [AnyShape(size, kind) for size in sizes]
        return [self.graphs.find(shape, self.run) is not None for _ in range(times) for shape in shapes]

    def capture_all(self) -> list[int]:
        """Capture graphs until no shape is left. Returns the captured sizes in order."""
        before = len(self.taken_ms)
        while self.graphs.capture_next(is_idle=True):
            pass
        return list(self.taken_ms)[before:]


class _SlowDevice(RecordingDevice):
    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        return lambda: None


def test_largest_shape_used_twice_without_a_graph_is_captured_first() -> None:
    bench = Bench()
    bench.ask(100, 300, 200, times=2)
    bench.ask(400)
    assert bench.capture_all() == [300, 200, 100]
    assert bench.ask(100, 200, 300, 400) == [True, True, True, False]
    assert (bench.metrics.graphs, bench.metrics.misses) == ({"denoise": 3}, {"denoise": 8})


def test_during_traffic_the_shape_missed_most_often_is_captured_first() -> None:
    bench = Bench()
    bench.ask(100, times=5)
    bench.ask(300, 200, times=3)
    for _ in range(1000):
        bench.clock.now += 0.01
        bench.graphs.capture_next(is_idle=False)
    assert list(bench.taken_ms) == [100, 300, 200]


def test_captures_take_a_tenth_of_the_time_while_rows_wait() -> None:
    bench = Bench()
    bench.ask(1000, times=2)
    bench.capture_all()
    bench.ask(*range(500, 1000), times=2)  # their captures will take 50 to 100 ms
    before, began = len(bench.taken_ms), bench.clock.now
    for _ in range(1000):
        bench.clock.now += 0.01
        bench.graphs.capture_next(is_idle=False)
    taken = list(bench.taken_ms.values())[before:]
    assert sum(taken) / 1000.0 == pytest.approx(0.1 * (bench.clock.now - began), rel=0.15)


def test_equal_sizes_of_two_kinds_have_their_own_graphs() -> None:
    bench = Bench()
    bench.ask(100, times=2)
    bench.ask(100, times=3, kind="decode")
    bench.capture_all()
    assert bench.ask(100) == bench.ask(100, kind="decode") == [True]
    assert (bench.metrics.graphs, bench.metrics.misses) == (
        {"denoise": 1, "decode": 1},
        {"denoise": 2, "decode": 3},
    )


def test_the_graph_that_was_unused_for_longest_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "MOST_GRAPHS", 2)
    bench = Bench()
    bench.ask(100, 200, times=2)
    bench.capture_all()
    bench.ask(200, 100, 300, 300)
    bench.capture_all()
    assert bench.ask(100, 200, 300) == [True, False, True]
    assert bench.metrics.graphs == {"denoise": 2}


def test_calls_of_a_kind_share_their_memory() -> None:
    bench = Bench()
    bench.ask(100, 300, times=2)
    bench.capture_all()
    small, large = (bench.graphs.find(AnyShape(size), bench.run) for size in (100, 300))
    assert small is not None
    assert large is not None
    assert small.memory.inputs.data_ptr() == large.memory.inputs.data_ptr()


def fail(shape: AnyShape, memory: CallMemory) -> None:
    raise RuntimeError("this call cannot be captured")


def overflow(shape: AnyShape, memory: CallMemory) -> None:
    raise torch.OutOfMemoryError("no room for this capture")


def test_after_a_failed_capture_no_call_is_captured() -> None:
    bench = Bench()
    bench.ask(100, times=2)
    bench.capture_all()
    for _ in range(2):
        bench.graphs.find(AnyShape(300), fail)
    assert bench.graphs.capture_next(is_idle=True)
    bench.ask(200, times=5)
    assert bench.capture_all() == []
    assert bench.ask(100) == [True]  # earlier captures are still used
    assert "cannot be captured" in bench.graphs.off_reason


def test_if_a_capture_finds_no_memory_only_smaller_calls_are_captured(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "captures-off")
    bench.device.survives_failed_capture = False
    for _ in range(2):
        bench.graphs.find(AnyShape(300), overflow)
    bench.ask(200, 400, times=2)
    assert bench.capture_all() == [400, 200]  # the largest is captured first
    for _ in range(9):
        bench.graphs.find(AnyShape(300), overflow)
    bench.ask(100, 500, times=9)
    assert bench.capture_all() == [100]
    assert bench.graphs.off_reason == ""
    assert list(tmp_path.iterdir()) == []


def test_no_memory_for_the_inputs_of_a_call_is_no_failed_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*sizes: int, **options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("the device is full")

    bench = Bench()
    bench.ask(100, times=2)
    monkeypatch.setattr(torch, "zeros", refuse)
    assert bench.graphs.capture_next(is_idle=True)
    assert bench.graphs.off_reason == ""
    assert bench.ask(100) == [False]


def test_a_torch_that_a_failed_capture_spoils_is_replaced_once(tmp_path: Path) -> None:
    """The first process ends. The process that replaces it captures nothing."""
    off_file = tmp_path / "cache" / "captures-off"

    def process() -> Bench:
        bench = Bench(off_file)
        bench.device.survives_failed_capture = False
        for _ in range(2):
            bench.graphs.find(AnyShape(300), fail)
        return bench

    with pytest.raises(DeviceLostError, match="does not survive"):
        process().graphs.capture_next(is_idle=True)
    assert not process().graphs.capture_next(is_idle=True)
    assert str(off_file) in process().graphs.off_reason
