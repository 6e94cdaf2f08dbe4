"""Limits how far the host queues work ahead of the device: how much of a row is encoded or decoded per turn, and how
many calls are unfinished. The times of finished calls correct the cost model. Independent of rows.
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

_CALLS_AHEAD = 2  # unfinished calls at most: enough to keep the device busy, few enough to react soon
_LEAST_MS = 10.0  # time limit of a turn's windows: shorter ones cost more than they help
_LENGTHS = (32, 64, 96, 128, 192, 256, 320, 384, 448, 512)  # few, because calls of equal length share graphs


class WindowPace:
    """Limits the windows of one turn. Used by the engine thread only."""

    def __init__(self, cost: CostModel, *, is_fixed: bool, turn_frames: int = 512) -> None:
        """`turn_frames` is the most latent frames of a row per turn. `is_fixed`: windows are cut as planned, run one
        per call, and a row has one per turn, because more would gain nothing.
        """
        self._cost = cost
        self.is_fixed = is_fixed
        self.turn_frames = 1 if is_fixed else turn_frames
        self._step_ms = 0.0

    def record_step(self, ms: float) -> None:
        """Record the predicted time of the last step.

        The measured time may include windows that ran in parallel, which would make the next windows ever longer.
        """
        self._step_ms = ms

    def decode_frames(self, num_rows: int, *, others_wait: bool) -> int:
        """Returns the most latent frames to decode now of each of `num_rows` rows.

        While other rows wait, the windows together take no longer than one step, or than a negligible time. Windows of
        equal length share a call.
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
class _QueuedCall:
    """Queued device work, compared with its prediction once it has ended."""

    work: Work
    calls: Sequence[Groups]
    began: Moment
    ended: Moment
    is_alone: bool  # no work of the other queue ran at the same time


class CallTimes:
    """Measures queued calls: steps run on the first queue, all other work on the second. For the engine thread only.

    Calls that overlapped with the other queue do not correct the cost model: they took longer because they shared the
    device, and the other queue's work would count twice. Together both queues still take the sum of their costs.
    """

    def __init__(self, device: Device, *, cost: CostModel, metrics: Metrics) -> None:
        self._device = device
        self._cost = cost
        self._metrics = metrics
        self._steps: deque[_QueuedCall] = deque()
        self._others: deque[_QueuedCall] = deque()

    def time(self, work: Work, calls: Sequence[Groups], *, run: Callable[[], Result]) -> Result:
        """Queue device work consisting of these calls, and measure it."""
        began = self._device.mark()
        result = run()
        queued = _QueuedCall(work, calls, began, self._device.mark(), is_alone=True)
        if work == "denoise":
            for other in self._others:  # calls queued later begin after this one
                if not other.ended.is_reached():
                    other.is_alone = queued.is_alone = False
            self._steps.append(queued)
        else:
            self._others.append(queued)
        return result

    @property
    def has_room_beside(self) -> bool:
        """Whether the second queue is no further behind than the first, so that it may take more windows."""
        windows = [call for call in self._others if call.work != "text" and not call.ended.is_reached()]
        return len(windows) <= _CALLS_AHEAD

    def keep_pace(self) -> None:
        """Wait until the device is at most a few calls behind, and record how long its calls took."""
        self._settle(self._others, wait=False)
        self._settle(self._steps, wait=True)
        if not self._steps:  # with steps, the host would wait for the slower queue while the faster one runs empty
            self._settle(self._others, wait=True)

    def _settle(self, calls: deque[_QueuedCall], *, wait: bool) -> None:
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
