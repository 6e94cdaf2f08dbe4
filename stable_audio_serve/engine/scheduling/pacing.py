"""Limits how far the host queues work ahead of the device: how much of a row is encoded or decoded per turn, and how
many calls may be unfinished. Also corrects the cost model by the times of finished calls. Independent of rows.
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

_CALLS_AHEAD = 2  # the most unfinished calls: enough to keep the device busy, few enough to react soon to new requests
_LEAST_MS = 10.0  # the windows of a turn may always take this long: shorter ones would cost more than they help
_LENGTHS = (32, 64, 96, 128, 192, 256, 320, 384, 448, 512)  # few, because calls of equal length share graphs


class WindowPace:
    """Limits the windows of one turn. Used by the engine thread only."""

    def __init__(self, cost: CostModel, *, is_fixed: bool, turn_frames: int = 512) -> None:
        """`turn_frames` is the most latent frames of a row per turn. With `is_fixed`, windows are cut as planned, and a
        row has one per turn: each window is its own call, so more per turn would save no time.
        """
        self._cost = cost
        self.is_fixed = is_fixed
        self.turn_frames = 1 if is_fixed else turn_frames
        self._step_ms = 0.0

    def record_step(self, ms: float) -> None:
        """Record the predicted time of the last step.

        The measured time is not used, because it includes windows that ran in parallel. Longer windows would then raise
        the limit of the next windows, which could grow from step to step.
        """
        self._step_ms = ms

    def decode_frames(self, num_rows: int, *, others_wait: bool) -> int:
        """Return the most latent frames to decode in this turn, of each of `num_rows` rows.

        While other rows wait, decoding that many frames of every row is predicted to take no longer than one step, or
        than `_LEAST_MS` if a step is shorter.
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
    """Queued device work, whose time is compared with its prediction once it has ended."""

    work: Work
    calls: Sequence[Groups]
    began: Moment
    ended: Moment
    is_alone: bool  # no work of the other queue ran at the same time


class CallTimes:
    """Measures queued calls. Steps run on the first queue, all other work on the second. Used by the engine thread
    only.

    Calls that overlapped with work of the other queue do not correct the cost model. They took longer only because they
    shared the device: both queues together take the sum of their separate times, which the model already predicts.
    """

    def __init__(self, device: Device, *, cost: CostModel, metrics: Metrics) -> None:
        self._device = device
        self._cost = cost
        self._metrics = metrics
        self._steps: deque[_QueuedCall] = deque()
        self._others: deque[_QueuedCall] = deque()

    def time(self, work: Work, calls: Sequence[Groups], *, run: Callable[[], Result]) -> Result:
        """Call `run`, which queues the device work of these calls, and measure the work. Returns its result."""
        began = self._device.mark()
        result = run()
        queued = _QueuedCall(work, calls, began, self._device.mark(), is_alone=True)
        if work == "denoise":
            for other in self._others:  # work that is queued on the second queue later starts after this step
                if not other.ended.is_reached():
                    other.is_alone = queued.is_alone = False
            self._steps.append(queued)
        else:
            self._others.append(queued)
        return result

    @property
    def second_queue_has_room(self) -> bool:
        """Whether the second queue may take more windows: it has at most `_CALLS_AHEAD` unfinished calls of windows."""
        windows = [call for call in self._others if call.work != "text" and not call.ended.is_reached()]
        return len(windows) <= _CALLS_AHEAD

    def keep_pace(self) -> None:
        """Wait until the device is at most a few calls behind, and record how long its calls took."""
        self._settle(self._others, wait=False)
        self._settle(self._steps, wait=True)
        if not self._steps:  # else the first queue might run empty while the host waits for the second
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
