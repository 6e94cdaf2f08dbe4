"""Limits how many unfinished calls the host queues on the device. Measures how long finished calls took, to correct the
cost model.
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

# The number of unfinished calls: enough to keep the device busy, and few enough that new requests start soon. For calls
# that encode or decode, simulated latencies are the same with 0, 2 and any number. The simulator does not model the
# time of the host.
_CALLS_AHEAD = 2


@dataclass(slots=True)
class _QueuedCall:
    """Work that is queued on the device. When it has ended, its time is compared with the predicted time."""

    work: Work
    calls: Sequence[Groups]
    began: Moment
    ended: Moment
    is_adapted: bool  # whether adapters applied
    is_alone: bool  # whether the device's other queue (CUDA stream) did nothing at the same time


class CallTimes:
    """Measures how long calls take on the device. Denoising steps run on the device's first queue (CUDA stream), all
    other work on the second. Used by the engine thread only.

    A call that ran at the same time as work of the other queue does not correct the cost model. It took longer because
    two calls shared the device, but the cost model predicts the time of a call that runs alone.
    """

    def __init__(self, device: Device, *, cost: CostModel, metrics: Metrics) -> None:
        self._device = device
        self._cost = cost
        self._metrics = metrics
        self._steps: deque[_QueuedCall] = deque()
        self._others: deque[_QueuedCall] = deque()

    def time(
        self, work: Work, calls: Sequence[Groups], *, run: Callable[[], Result], is_adapted: bool = False
    ) -> Result:
        """Call `run`, which must queue the device work of `calls`, and return its result. The time of the device work
        is recorded once it has finished.

        `is_adapted` says whether adapters apply to the calls.
        """
        began = self._device.mark()
        result = run()
        queued = _QueuedCall(work, calls, began, self._device.mark(), is_adapted=is_adapted, is_alone=True)
        if work == "denoise":
            # Unfinished work of the second queue runs at the same time as this step. Work that is queued there later
            # starts after this step.
            for other in self._others:
                if not other.ended.is_reached():
                    other.is_alone = queued.is_alone = False
            self._steps.append(queued)
        else:
            self._others.append(queued)
        return result

    @property
    def second_queue_has_room(self) -> bool:
        """Whether more windows may be encoded or decoded. False if more than `_CALLS_AHEAD` earlier steps have windows
        that the device has not finished.
        """
        windows = [call for call in self._others if call.work != "text" and not call.ended.is_reached()]
        return len(windows) <= _CALLS_AHEAD

    def keep_pace(self) -> None:
        """Wait until the device has only a few unfinished calls, and record how long the finished calls took."""
        self._settle(self._others, wait=False)
        self._settle(self._steps, wait=True)
        # While a step is queued, do not wait: the device could finish its last step and then have nothing to denoise.
        if not self._steps:
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
                self._cost.correct(oldest.work, oldest.calls, measured_ms=ms, is_adapted=oldest.is_adapted)
            self._metrics.observe(f"engine_{oldest.work}_ms", ms)
