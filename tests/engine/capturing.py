"""CPU devices that simulate CUDA graphs by calling the captured function again, and metrics that count graphs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from threading import Condition

import torch

from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.metrics import NullMetrics
from stable_audio_serve.engine.hardware.device import Device
from tests.engine.late_device import LateDevice, record

MOST_ROUNDS = 60  # a test repeats its requests at most so many times until the engine has captured their calls


class _Capturing:
    can_capture = True
    num_replays = 0

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        run()

        def replay() -> None:
            self.num_replays += 1
            run()

        return replay


class RecordingDevice(_Capturing, Device):
    """A CPU device that simulates CUDA graphs."""

    def __init__(self, clock: Clock = SystemClock()) -> None:
        super().__init__(torch.device("cpu"), clock=clock)
        self.can_capture = True


class RecordedDevice(RecordingDevice):
    """Simulates CUDA graphs: a capture records each operation with the memory that it reads and writes."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        recorded = record(run)

        def replay() -> None:
            self.num_replays += 1
            recorded()

        return replay


class LateRecordingDevice(_Capturing, LateDevice):
    """A `LateDevice` that simulates CUDA graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.can_capture = True


class GraphCounts(NullMetrics):
    """Metrics that count, for each kind of engine call, the captured graphs and the calls that ran without a graph."""

    def __init__(self) -> None:
        self.graphs: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        self.num_off = 0  # how often captures were switched off
        self._changed = Condition()

    async def are_captured(self, *kinds: str) -> bool:
        """Give an idle engine time to capture graphs. Returns whether there is a graph of each kind of call.

        Graphs are captured for shapes that repeat, and the machine's speed determines which requests share a call.
        So a test repeats its requests until this returns True.
        """

        def wait() -> bool:
            with self._changed:
                return self._changed.wait_for(lambda: all(self.graphs[kind] for kind in kinds), timeout=1.0)

        return await asyncio.to_thread(wait)

    def gauge(self, name: str, value: float, **labels: str) -> None:
        super().gauge(name, value, **labels)
        if name == "engine_graphs":
            with self._changed:
                self.graphs[labels["kind"]] = int(value)
                self._changed.notify_all()

    def increment(self, name: str, value: float = 1.0, **labels: str) -> None:
        super().increment(name, value, **labels)
        if name == "engine_captures_off":
            self.num_off += 1
        if name == "engine_graph_misses":
            self.misses[labels["kind"]] += int(value)
