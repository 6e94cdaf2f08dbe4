"""A device without graphs that "captures" by recording the function to run, and metrics that count captures."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from threading import Condition

import torch

from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.metrics import NullMetrics
from stable_audio_serve.engine.hardware.device import WaitingDevice
from tests.engine.late_device import LateDevice

MOST_ROUNDS = 60  # times that a load is repeated so that its calls are captured


class _Capturing:
    can_capture = True
    num_replays = 0

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        run()

        def replay() -> None:
            self.num_replays += 1
            run()

        return replay


class RecordingDevice(_Capturing, WaitingDevice):
    """Like a CPU device, except for captures."""

    def __init__(self, clock: Clock = SystemClock()) -> None:
        super().__init__(torch.device("cpu"), clock=clock)
        self.can_capture = True


class LateRecordingDevice(_Capturing, LateDevice):
    """Its second queue runs as late as possible."""

    def __init__(self) -> None:
        super().__init__()
        self.can_capture = True


class GraphCounts(NullMetrics):
    """The number of graphs, and of calls without one, by kind."""

    def __init__(self) -> None:
        self.graphs: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        self._changed = Condition()

    async def are_captured(self, *kinds: str) -> bool:
        """Returns whether there is a graph of each kind, after giving an idle engine time to capture.

        Which requests share a call, and so which shapes repeat, depends on the speed of the machine: repeat the load
        until this is true.
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
        if name == "engine_graph_misses":
            self.misses[labels["kind"]] += int(value)
