"""Limits how much work the host queues before the device has done the earlier work: how many latent frames of a clip
are encoded or decoded in one turn of the engine, and how many calls may be unfinished. Also measures finished calls, to
correct the cost model.
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

_CALLS_AHEAD = 2  # unfinished calls: enough to keep the device busy, few enough that new requests start soon
_LEAST_MS = 10.0  # decoding in one turn may always take this long, because very short windows are inefficient
# The allowed lengths of decoded windows, in latent frames. They are few, because each length needs a CUDA graph.
_LENGTHS = (32, 64, 96, 128, 192, 256, 320, 384, 448, 512)


class WindowPace:
    """Limits how much of a clip is decoded in one turn, so that denoising steps of other clips are not delayed much.
    Used by the engine thread only.
    """

    def __init__(self, cost: CostModel, *, is_fixed: bool, turn_frames: int = 512) -> None:
        """In one turn, at most `turn_frames` latent frames of a clip are encoded or decoded.

        With `is_fixed`, the windows are exactly the planned ones, and one window of a clip runs per turn. More would
        save no time, because each window is a separate call.
        """
        self._cost = cost
        self.is_fixed = is_fixed
        self.turn_frames = 1 if is_fixed else turn_frames
        self._step_ms = 0.0

    def record_step(self, ms: float) -> None:
        """Record the predicted time of the last denoising step, which limits the time of decoding.

        The measured time of a step would be wrong here, because decoding in parallel makes a step slower. More decoding
        would then raise its own limit, from step to step.
        """
        self._step_ms = ms

    def decode_frames(self, num_rows: int, *, others_wait: bool) -> int:
        """Return how many latent frames to decode at most in this turn, for each of `num_rows` clips.

        If other clips wait, the limit is low enough that decoding is predicted to take no longer than one denoising
        step, or than `_LEAST_MS` if a step is shorter.
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
    """Work that is queued on the device. When it has ended, its time is compared with the predicted time."""

    work: Work
    calls: Sequence[Groups]
    began: Moment
    ended: Moment
    is_alone: bool  # whether the device's other queue (CUDA stream) did nothing at the same time


class CallTimes:
    """Measures how long calls take on the device. Denoising steps run on the device's first queue (CUDA stream), all
    other work on the second. Used by the engine thread only.

    Calls that ran at the same time as work of the other queue are not used to correct the cost model. They are slower
    only because two calls share the device. The model predicts the time of each call alone, and their sum is right.
    """

    def __init__(self, device: Device, *, cost: CostModel, metrics: Metrics) -> None:
        self._device = device
        self._cost = cost
        self._metrics = metrics
        self._steps: deque[_QueuedCall] = deque()
        self._others: deque[_QueuedCall] = deque()

    def time(self, work: Work, calls: Sequence[Groups], *, run: Callable[[], Result]) -> Result:
        """Call `run`, which must queue the device work of `calls`, and measure that work. Returns the result."""
        began = self._device.mark()
        result = run()
        queued = _QueuedCall(work, calls, began, self._device.mark(), is_alone=True)
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
        """Whether more windows may be encoded or decoded: at most `_CALLS_AHEAD` such calls are unfinished."""
        windows = [call for call in self._others if call.work != "text" and not call.ended.is_reached()]
        return len(windows) <= _CALLS_AHEAD

    def keep_pace(self) -> None:
        """Wait until the device has only a few unfinished calls, and record how long the finished calls took."""
        self._settle(self._others, wait=False)
        self._settle(self._steps, wait=True)
        # Only if no step is queued. Otherwise, while the host waits here, the device might finish its last step.
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
                self._cost.correct(oldest.work, oldest.calls, measured_ms=ms)
            self._metrics.observe(f"engine_{oldest.work}_ms", ms)
