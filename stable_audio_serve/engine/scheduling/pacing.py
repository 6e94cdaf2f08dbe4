"""How far the host asks ahead of the device: how much of a row is encoded or decoded in one turn, so that others do not
wait, and the calls that were asked for and have not ended, whose times correct the cost model. Knows no rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.engine.hardware.device import Device, Moment
from stable_audio_serve.engine.scheduling.cost import CostModel, Groups, Work

Result = TypeVar("Result")

_CALLS_AHEAD = 2  # of the host, at most: enough that the device always has work, few enough to react soon
_LEAST_MS = 10.0  # of a turn's windows: shorter ones cost more than they help
_LENGTHS = (32, 64, 96, 128, 192, 256, 320, 384, 448, 512)  # few, because calls of one length share graphs


class WindowPace:
    """Limits the windows of one turn. Used by the engine thread only."""

    def __init__(self, cost: CostModel, *, is_fixed: bool, turn_frames: int = 512) -> None:
        """`turn_frames` is the most latent frames of a row in one turn. `is_fixed`: windows are cut as planned, each is
        a call of its own, and a row has one in each turn, because more would gain nothing.
        """
        self._cost = cost
        self.is_fixed = is_fixed
        self.turn_frames = 1 if is_fixed else turn_frames
        self._step_ms = 0.0

    def saw_step(self, ms: float) -> None:
        """Remember how long the last step is predicted to take.

        Its measured time may contain windows that ran beside it, which would make the next ones longer and longer.
        """
        self._step_ms = ms

    def decode_frames(self, num_rows: int, *, others_wait: bool) -> int:
        """Returns the most latent frames of each of `num_rows` rows to decode now.

        While others wait, all of them together take no longer than one step, or than a time that nobody notices;
        windows of one length share a call.
        """
        if self.is_fixed or not others_wait:
            return self.turn_frames
        most_ms = max(self._step_ms, _LEAST_MS)
        fitting = [
            frames
            for frames in _LENGTHS
            if frames <= self.turn_frames and self._cost.call_ms("decode", rows=num_rows, frames=frames) <= most_ms
        ]
        return fitting[-1] if fitting else min(_LENGTHS[0], self.turn_frames)


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
