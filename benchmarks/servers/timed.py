"""The whole server with simulated devices, to measure routing, Ray and HTTP with more replicas than CPU cores.

A simulated device serves one request at a time: it waits for a computed time and returns a prepared clip.

This module must not import torch or transformers, so that the replicas start fast.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from stable_audio_serve.core.errors import OverloadedError, StableAudioError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, StageTimings
from stable_audio_serve.core.pricing import Prices
from stable_audio_serve.core.settings import ModelSettings, Settings
from stable_audio_serve.serving.work_ledger import ReplicaWork

_LEAST_RETRY_S = 0.1
_RATE_HZ, _HOP = 44_100, 4096
_DEFAULT_STEPS = 8


@dataclass(frozen=True, slots=True)
class LinearDevice:
    """A simulated device. A call takes a fixed time, plus a time for each row and latent frame, in milliseconds."""

    text_ms: float = 4.0
    step_ms: float = 10.0
    step_per_frame_ms: float = 0.1
    decode_ms: float = 6.0
    decode_per_frame_ms: float = 0.2

    def stages(self, request: GenerationRequest) -> StageTimings:
        """Returns the times of a request's stages on an idle device: text, then steps and decoding of each variation.

        A step with guidance has two rows. A latent frame is as long as in Stable Audio 3.
        """
        rows = 1 if request.cfg_scale in (None, 1.0) else 2
        frames = math.ceil(request.duration_s * _RATE_HZ / _HOP)
        evaluations = request.batch_size * (request.steps or _DEFAULT_STEPS)
        denoise_ms = evaluations * (self.step_ms + self.step_per_frame_ms * rows * frames)
        decode_ms = request.batch_size * (self.decode_ms + self.decode_per_frame_ms * frames)
        total_ms = self.text_ms + denoise_ms + decode_ms
        return StageTimings(text_ms=self.text_ms, denoise_ms=denoise_ms, decode_ms=decode_ms, total_ms=total_ms)

    @property
    def prices(self) -> Prices:
        """The prices with which the router predicts times of requests. For guided steps, they are slightly too high."""
        frames_per_s = _RATE_HZ / _HOP
        return Prices(
            row_ms=self.text_ms + self.decode_ms,
            evaluation_ms=self.step_ms,
            evaluated_second_ms=self.step_per_frame_ms * frames_per_s,
            audio_second_ms=self.decode_per_frame_ms * frames_per_s,
            default_steps=_DEFAULT_STEPS,
        )


DEVICE = LinearDevice()
# A device for a benchmark whose clips have a tenth of their usual length, so that the server sends less audio. A frame
# takes ten times as long as on `DEVICE`. Then all times are divided by eight, so that the benchmark is shorter.
SHORTENING_DEVICE = LinearDevice(0.5, 1.25, step_per_frame_ms=0.125, decode_ms=0.75, decode_per_frame_ms=0.25)


class TimedReplica:
    """A replica with a simulated device, which serves requests one after another in order of arrival.

    The end of each request is computed from the end of the previous one, so a late wake-up of this process does not
    leave the device idle. A cancelled request still takes its time on the device.
    """

    times: ClassVar[LinearDevice] = DEVICE

    def __init__(self, settings: Settings, model: ModelSettings) -> None:
        self._model = model.name
        self._max_queue_s = model.max_queue_s
        self._free_at = time.monotonic()

    @property
    def backlog_s(self) -> float:
        """The device time of accepted requests that the device has not finished."""
        return max(0.0, self._free_at - time.monotonic())

    async def generate(self, request: GenerationRequest) -> GenerationResult | StableAudioError:
        """Returns the audio, or an error, which is not raised. The real replica does the same."""
        waiting_s = self.backlog_s
        if waiting_s > self._max_queue_s:
            retry_s = max(waiting_s - self._max_queue_s, _LEAST_RETRY_S)
            return OverloadedError("the device's queue is full", retry_after_s=retry_s)
        stages = self.times.stages(request)
        self._free_at = ended_at = max(time.monotonic(), self._free_at) + stages.total_ms / 1000.0
        await asyncio.sleep(max(0.0, ended_at - time.monotonic()))
        queue_ms = 1000.0 * waiting_s
        timings = replace(stages, queue_ms=queue_ms, total_ms=stages.total_ms + queue_ms)
        clip = _clip(int(request.duration_s * _RATE_HZ))
        seeds = tuple(request.seed + index for index in range(request.batch_size))
        return GenerationResult((clip,) * request.batch_size, _RATE_HZ, self._model, seeds, timings)

    def record_routing_stats(self) -> dict[str, Any]:
        """Called by Ray Serve. Returns what `/health`, the launcher and our router read."""
        return {"device": "timed"} | ReplicaWork.now(1000.0 * self.backlog_s, self.times.prices).to_dict()


class ShorteningReplica(TimedReplica):
    """A TimedReplica with the device SHORTENING_DEVICE, for clips with a tenth of their usual length."""

    times = SHORTENING_DEVICE


@lru_cache(maxsize=4)
def _clip(samples: int) -> Any:
    """Returns a clip at 44.1 kHz, (2, samples) float32: a chord with some noise."""
    chord = sum(np.sin(2 * np.pi * hz * np.arange(samples) / _RATE_HZ) for hz in (110, 277, 659))
    noise = np.random.default_rng(0).normal(0.0, 0.02, (2, samples))
    return np.ascontiguousarray(0.2 * chord + noise, dtype=np.float32)


def build(args: Settings) -> Any:
    """Build the application of `serving.app` with TimedReplica as the class of replicas."""
    from stable_audio_serve.serving.app import assemble

    return assemble(args, replica=TimedReplica)


def build_shortening(args: Settings) -> Any:
    """Build the application of `serving.app` with ShorteningReplica as the class of replicas."""
    from stable_audio_serve.serving.app import assemble

    return assemble(args, replica=ShorteningReplica)
