"""The device calls that were asked for and have not been seen to end: how far the device is behind the host, and what
their times teach the cost model. Knows no rows and no model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.engine.call_cost import Groups
from stable_audio_serve.engine.cost import CostModel, Work
from stable_audio_serve.engine.device import Device, Moment

Result = TypeVar("Result")

_CALLS_AHEAD = 2  # of the host, at most: enough that the device always has work, few enough to react soon


@dataclass(slots=True)
class _Asked:
    """Device work to be compared with its prediction once it has ended."""

    work: Work
    calls: Sequence[Groups]
    began: Moment
    ended: Moment
    is_alone: bool  # no work of the other queue ran beside it


class CallTimes:
    """Steps are the first queue's work, everything else the second's. Used by the engine thread only.

    Calls that ran beside others are not learned from: they took longer because they shared the device, and a cost that
    contains the other queue's work would count it twice. Both queues together still take the sum of their costs.
    """

    def __init__(self, device: Device, *, cost: CostModel, metrics: Metrics) -> None:
        self._device = device
        self._cost = cost
        self._metrics = metrics
        self._steps: deque[_Asked] = deque()
        self._others: deque[_Asked] = deque()

    def time(self, work: Work, calls: Sequence[Groups], *, run: Callable[[], Result]) -> Result:
        """Run device work, of these calls, in the queue that is its own."""
        began = self._device.mark()
        result = run()
        asked = _Asked(work, calls, began, self._device.mark(), is_alone=True)
        if work == "denoise":
            for other in self._others:  # those that are asked for later begin after this one
                if not other.ended.is_reached():
                    other.is_alone = asked.is_alone = False
            self._steps.append(asked)
        else:
            self._others.append(asked)
        return result

    @property
    def has_room_beside(self) -> bool:
        """Whether the second queue is no further behind than the first, so that it may get more windows."""
        windows = [call for call in self._others if call.work != "text" and not call.ended.is_reached()]
        return len(windows) <= _CALLS_AHEAD

    def keep_pace(self) -> None:
        """Wait until the device is at most a few calls behind, and learn how long its calls took."""
        self._settle(self._others, wait=False)
        self._settle(self._steps, wait=True)
        if not self._steps:  # else the host would wait for the slower queue while the faster one runs dry
            self._settle(self._others, wait=True)

    def _settle(self, calls: deque[_Asked], *, wait: bool) -> None:
        while calls:
            oldest = calls[0]
            if not oldest.ended.is_reached():
                if not wait or len(calls) <= _CALLS_AHEAD:
                    return
                oldest.ended.wait()
            calls.popleft()
            ms = oldest.ended.ms_since(oldest.began)
            if oldest.is_alone:
                self._cost.correct(oldest.work, oldest.calls, measured_ms=ms)
            self._metrics.observe(f"engine_{oldest.work}_ms", ms)
