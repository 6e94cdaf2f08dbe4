"""The whole server around a device that is only a clock: each replica holds one that does one thing at a time, for as
long as a device model says, and answers a clip that is there already. So routing, Ray and HTTP are measured with more
replicas than this machine has cores. Must not import torch or transformers, as replicas of it never do.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any, ClassVar

from benchmarks.servers.instant import make_result
from benchmarks.simulate.devices import DeviceModel, LinearDevice
from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.errors import OverloadedError, StableAudioError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, Progress, StageTimings
from stable_audio_serve.core.pricing import Prices
from stable_audio_serve.core.settings import ModelSettings, Settings
from stable_audio_serve.serving.autoscaling import replica_stats
from stable_audio_serve.serving.work_ledger import ReplicaWork

_LEAST_RETRY_S = 0.1
_RATE_HZ, _HOP = 44_100, 4096
_DEFAULT_STEPS = 8


DEVICE = LinearDevice(
    text_fixed_ms=4.0,
    step_fixed_ms=10.0,
    step_per_frame_ms=0.1,
    coding_fixed_ms=6.0,
    coding_per_frame_ms=0.2,
)
# For clips of a tenth of the length, and eight times as fast: the same work in an eighth of the time, in fewer bytes.
SHORTENED = 10.0
SHORTENING_DEVICE = LinearDevice(
    text_fixed_ms=DEVICE.text_fixed_ms / 8,
    step_fixed_ms=DEVICE.step_fixed_ms / 8,
    step_per_frame_ms=SHORTENED * DEVICE.step_per_frame_ms / 8,
    coding_fixed_ms=DEVICE.coding_fixed_ms / 8,
    coding_per_frame_ms=SHORTENED * DEVICE.coding_per_frame_ms / 8,
)


class TimedDevice:
    """One device that serves requests one after another in order of their arrival, and knows neither deadlines nor
    priorities. While work is waiting it is never idle, however late this process wakes up: only the clock counts.
    """

    def __init__(
        self,
        times: DeviceModel = DEVICE,
        *,
        max_queue_s: float = float("inf"),
        clock: Clock = SystemClock(),
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._times = times
        self._max_ms = max_queue_s * 1000.0
        self._clock = clock
        self._sleep = sleep
        self._turn = asyncio.Lock()  # handed on in order
        self._waiting_ms = 0.0
        self._accepted_ms = 0.0  # device time of everything ever accepted
        self._num_waiting = 0
        self._free_at = float("-inf")

    @property
    def backlog_ms(self) -> float:
        """Device time of everything accepted that is not spent yet."""
        return self._waiting_ms + max(0.0, self._free_at - self._clock.monotonic()) * 1000.0

    @property
    def busy_s(self) -> float:
        """How long it has worked, seconds."""
        return (self._accepted_ms - self.backlog_ms) / 1000.0

    async def run(self, request: GenerationRequest) -> StageTimings:
        """Returns the stages once the device has done them. A cancelled request frees it at once.

        Raises OverloadedError when more than `max_queue_s` of work is ahead, as an engine does.
        """
        arrived_at = self._clock.monotonic()
        self._require_room()
        stages = predict_stages(self._times, request)
        self._accepted_ms += stages.total_ms
        await self._wait_for_turn(stages.total_ms)
        started_at = max(arrived_at, self._free_at)
        self._free_at = started_at + stages.total_ms / 1000.0
        try:
            while (left_s := self._free_at - self._clock.monotonic()) > 0:
                await self._sleep(left_s)
        except asyncio.CancelledError:
            self._free_at = self._clock.monotonic()
            raise
        finally:
            self._turn.release()
        queue_ms = (started_at - arrived_at) * 1000.0
        return replace(stages, queue_ms=queue_ms, total_ms=stages.total_ms + queue_ms)

    def _require_room(self) -> None:
        excess_s = (self.backlog_ms - self._max_ms) / 1000.0
        if excess_s > 0:
            raise OverloadedError("the device's queue is full", retry_after_s=max(excess_s, _LEAST_RETRY_S))

    async def _wait_for_turn(self, work_ms: float) -> None:
        self._waiting_ms += work_ms
        self._num_waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._num_waiting -= 1
            self._waiting_ms = self._waiting_ms - work_ms if self._num_waiting else 0.0  # no rest of rounding


def predict_stages(times: DeviceModel, request: GenerationRequest) -> StageTimings:
    """Returns what a request takes on an idle device: text, `steps` steps and the decoder for each variation by itself,
    with two rows a step where it is guided. Latent frames are Stable Audio 3's.
    """
    rows = 1 if request.cfg_scale in (None, 1.0) else 2
    frames = math.ceil(request.duration_s * _RATE_HZ / _HOP)
    text_ms = times.text_ms(1)
    denoise_ms = request.batch_size * (request.steps or _DEFAULT_STEPS) * times.step_ms(rows, frames)
    decode_ms = request.batch_size * times.decode_ms(1, frames)
    total_ms = text_ms + denoise_ms + decode_ms
    return StageTimings(text_ms=text_ms, denoise_ms=denoise_ms, decode_ms=decode_ms, total_ms=total_ms)


def prices_of(times: LinearDevice) -> Prices:
    """Returns what work costs on a device; a guided step costs a little less."""
    frames_per_s = _RATE_HZ / _HOP
    return Prices(
        row_ms=times.text_fixed_ms + times.coding_fixed_ms,
        evaluation_ms=times.step_fixed_ms,
        evaluated_second_ms=times.step_per_frame_ms * frames_per_s,
        audio_second_ms=times.coding_per_frame_ms * frames_per_s,
        default_steps=_DEFAULT_STEPS,
    )


class TimedReplica:
    """Answers like `serving.replica.ModelReplica`, when its device has had the time."""

    times: ClassVar[LinearDevice] = DEVICE

    def __init__(self, settings: Settings, model: ModelSettings) -> None:
        self._model = model.name
        self._device = TimedDevice(self.times, max_queue_s=model.max_queue_s)
        self._looked_at = time.monotonic(), 0.0
        self._waiting = 0.0, float("-inf")
        self._outcomes = dict.fromkeys(("in_flight", "finished", "cancelled", "expired", "failed"), 0)

    async def generate(self, request: GenerationRequest) -> GenerationResult | StableAudioError:
        """A clip of the length asked for, or the refusal."""
        self._outcomes["in_flight"] += 1
        outcome = "failed"
        try:
            timings = await self._device.run(request)
            outcome = "finished"
            return replace(make_result(self._model, request), timings=timings)
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except OverloadedError as error:
            return error
        finally:
            self._outcomes["in_flight"] -= 1
            self._outcomes[outcome] += 1

    async def generate_reporting(
        self, request: GenerationRequest
    ) -> AsyncIterator[Progress | GenerationResult | StableAudioError]:
        """The same for a streaming handle."""
        yield Progress("denoising", 0.0)
        yield await self.generate(request)

    def record_routing_stats(self) -> dict[str, Any]:
        """Called by Serve."""
        return ReplicaWork.now(self._device.backlog_ms, prices_of(self.times)).to_dict()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """As the real one."""
        now, busy_s = time.monotonic(), self._device.busy_s
        before, busy_before_s = self._looked_at
        self._looked_at = now, busy_s
        waiting_s, told_at = self._waiting
        return replica_stats(
            work_s=self._device.backlog_ms / 1000.0,
            busy_share=min(1.0, max(0.0, busy_s - busy_before_s) / max(now - before, 0.1)),
            waiting_s=waiting_s if now - told_at < 5.0 else 0.0,
        )

    async def note_waiting(self, seconds: float, is_kept: bool = False) -> None:
        """As the real one."""
        self._waiting = seconds, time.monotonic()

    async def status(self) -> object:
        """Returns what it has done and what its device still has to do."""
        from stable_audio_serve.serving.model_states import ReplicaStatus

        return ReplicaStatus(
            device="timed", start_s={}, backlog_ms=self._device.backlog_ms, quality=None, **self._outcomes
        )


class ShorteningReplica(TimedReplica):
    """For clips of a tenth of the length."""

    times = SHORTENING_DEVICE


def build(args: Settings) -> Any:
    """The application of `serving.app` with timed replicas."""
    from stable_audio_serve.serving.app import assemble

    return assemble(args, replica=TimedReplica)


def build_shortening(args: Settings) -> Any:
    """The same with the device for short clips."""
    from stable_audio_serve.serving.app import assemble

    return assemble(args, replica=ShorteningReplica)
