"""A small `Backend` for HTTP tests. It generates deterministic tones, raises chosen errors and records its calls."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from stable_audio_serve.core.catalog import ModelCard, ModelCatalog, ModelStatus
from stable_audio_serve.core.errors import DeadlineExceededError, StartTimeoutError
from stable_audio_serve.core.generation import (
    DeviceUse,
    GenerationRequest,
    GenerationResult,
    Loaded,
    ProgressCallback,
    Provenance,
    StageTimings,
)

RATE_HZ = 44100


def make_catalog() -> ModelCatalog:
    names = {"small-sfx": 120.0, "small-music": 120.0, "medium": 380.0}
    cards = [
        ModelCard(
            name,
            "stable-audio-3",
            aliases=(f"stable-audio-3-{name}", f"stabilityai/stable-audio-3-{name}"),
            max_duration_s=max_duration_s,
        )
        for name, max_duration_s in names.items()
    ]
    demo = ModelCard("demo", "stable-audio-3", max_duration_s=5.0, is_demo=True, default_steps=100)
    return ModelCatalog([*cards, demo])


def open_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass
class ToneBackend:
    """Generates sine tones with the peak `level`. The pitch depends on the seed.

    Records the requests and counts cancelled requests.
    """

    catalog: ModelCatalog = field(default_factory=make_catalog)
    statuses: dict[str, ModelStatus] = field(default_factory=lambda: {"small-sfx": ModelStatus("ready", 1, "cpu")})
    delay_s: float = 0.0
    released: asyncio.Event = field(default_factory=open_event)  # while it is not set, requests wait
    queue_s: float = 0.0  # how long each request waits before it starts
    error: Exception | None = None
    device: DeviceUse = field(default_factory=DeviceUse)
    level: float = 0.5
    prompt_chars: int | None = None  # the model ignores a prompt's characters after this number
    requests: list[tuple[str, GenerationRequest]] = field(default_factory=list)
    num_running: int = 0
    num_cancelled: int = 0

    async def generate(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
    ) -> GenerationResult:
        self.requests.append((model, request))
        self.num_running += 1
        try:
            if request.start_within_s is not None and request.start_within_s < self.queue_s:
                await asyncio.sleep(request.start_within_s)
                raise StartTimeoutError(f"the request did not start within its {request.start_within_s:g} s")
            async with asyncio.timeout(request.deadline_s):
                await asyncio.sleep(self.queue_s)
                await asyncio.sleep(self.delay_s)
                await self.released.wait()
        except TimeoutError as error:
            raise DeadlineExceededError("the time budget ran out", field="deadline_s") from error
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_running -= 1
        if self.error is not None:
            raise self.error
        seeds = request.seeds
        t = np.arange(RATE_HZ) / RATE_HZ  # one second, after which each tone repeats
        tones = ((self.level * np.sin(2 * np.pi * (100 + seed % 1000) * t)).astype(np.float32) for seed in seeds)
        num_samples = max(int(request.duration_s * RATE_HZ), 1)
        audio = tuple(np.tile(np.resize(tone, num_samples), (2, 1)) for tone in tones)
        timings = StageTimings(queue_ms=1, denoise_ms=2, total_ms=3)
        result = GenerationResult(audio, RATE_HZ, model, seeds, timings, self.device)
        if self.prompt_chars is None or len(request.prompt) <= self.prompt_chars:
            return result
        provenance = Provenance(
            "0", torch="0", mode="strict", processor="0", loaded=Loaded(), prompt_chars=self.prompt_chars
        )
        return replace(result, provenance=provenance)

    async def status(self) -> Mapping[str, ModelStatus]:
        return self.statuses

    @property
    def last(self) -> GenerationRequest:
        return self.requests[-1][1]


@dataclass
class PausingBackend(ToneBackend):
    """Makes `num_free` clips without a delay. The next clip clears `released`, and waits until it is set."""

    num_free: int = 1

    async def generate(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
    ) -> GenerationResult:
        if len(self.requests) == self.num_free:
            self.released.clear()
        return await super().generate(model, request, on_progress=on_progress)
