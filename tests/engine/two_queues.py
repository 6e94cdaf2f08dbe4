"""A device with two simulated CUDA streams and a virtual clock. This module does not depend on the engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stable_audio_serve.engine.hardware.device import Device, Moment
from tests.factories import FakeClock
from tests.patience import PATIENCE_S


class TwoQueues(Device):
    """Two simulated CUDA streams (queues). A model calls `take` with the time of each of its calls.

    Work on the second stream begins after all earlier work on the first. While the second works, the first waits.
    """

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(torch.device("cpu"), clock=clock)
        self.has_second_queue = True
        self.default_mode = "fast"
        self.calls: list[tuple[bool, float, float]] = []  # (whether on the second stream, begin and end in seconds)
        self.gate = threading.Event()
        self.gate.set()
        self.has_work = threading.Event()
        self._time = clock
        self._first_free_at = self._second_free_at = 0.0
        self._busy: list[tuple[float, float]] = []  # begin and end of the work on the second stream, in seconds
        self._is_on_second_queue = False

    def take(self, took_s: float) -> None:
        """Wait until the gate is open, then add `took_s` seconds of work to the current stream."""
        self.has_work.set()
        assert self.gate.wait(PATIENCE_S)
        if self._is_on_second_queue:
            began_at = max(self._second_free_at, self._time.now)
            self._second_free_at = ended_at = began_at + took_s
            self._busy.append((began_at, ended_at))
        else:
            began_at = ended_at = max(self._first_free_at, self._time.now)
            for busy_from, busy_to in self._busy:
                free_s = max(busy_from - ended_at, 0.0)
                if free_s >= took_s:
                    break
                took_s -= free_s
                ended_at = max(ended_at, busy_to)
            self._first_free_at = ended_at = ended_at + took_s
        self.calls.append((self._is_on_second_queue, began_at, ended_at))

    @contextmanager
    def on_second_queue(self, *reads: torch.Tensor) -> Iterator[None]:
        self._second_free_at = max(self._second_free_at, self._first_free_at)
        self._is_on_second_queue = True
        yield
        self._is_on_second_queue = False

    def mark(self) -> Moment:
        return VirtualPoint(self._time, self._second_free_at if self._is_on_second_queue else self._first_free_at)

    def follow(self, moment: Moment) -> None:
        assert isinstance(moment, VirtualPoint)
        self._first_free_at = max(self._first_free_at, moment.at_s)


class VirtualPoint:
    def __init__(self, clock: FakeClock, at_s: float) -> None:
        self._clock = clock
        self.at_s = max(at_s, clock.now)

    def is_reached(self) -> bool:
        return self._clock.now >= self.at_s

    def wait(self) -> None:
        self._clock.now = max(self._clock.now, self.at_s)

    def ms_since(self, earlier: Moment) -> float:
        assert isinstance(earlier, VirtualPoint)
        return (self.at_s - earlier.at_s) * 1000.0
