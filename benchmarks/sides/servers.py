"""Each side in one process: `await side.generate(request)`. `lock` works on one request at a time, first come first
served; `static` on batches of like requests; `ours` is the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Protocol

from benchmarks.sides.batcher import Batcher
from benchmarks.sides.pipeline import Pipeline
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.engine.batching import Call, Lane, OneRowPerCall
from stable_audio_serve.engine.call_shapes import round_up
from stable_audio_serve.models.protocol import DiffusionModel

MAX_BATCH = 32
BATCH_WAIT_S = 0.01
_BUCKET_FRAMES = {"cpu": 16, "cuda": 64}  # latent frames; narrower on a CPU, where padding costs as much as sound

BatchKey = tuple[object, ...]
Batched = Callable[[GenerationRequest], Awaitable[GenerationResult]]
RunBatch = Callable[[list[GenerationRequest]], Awaitable[Sequence[GenerationResult]]]


class Side(Protocol):
    """What is compared."""

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        """Returns the audio of one request."""
        ...

    async def close(self) -> None:
        """Stop; nothing is in flight."""
        ...


class OneCall:
    """All rows of a batch in one device call, padded to the longest."""

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        rows, frames = sum(lane.branches for lane in lanes), max(lane.frames for lane in lanes)
        return [Call(tuple(range(len(lanes))), rows, frames)]

    def crowd(self, branches: int, frames: int) -> int:
        return branches

    def padded(self, frames: int) -> int:
        return frames


class LockServer:
    """The pipeline behind a mutex: what a handler around a model does."""

    def __init__(self, model: DiffusionModel, options: EngineOptions) -> None:
        self._pipeline = Pipeline(model, options, policy=OneRowPerCall(), together=1)
        self._lock = asyncio.Lock()

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        async with self._lock:
            return (await self._pipeline.run([request]))[0]

    async def close(self) -> None:
        await asyncio.to_thread(self._pipeline.close)


class StaticServer:
    """Batches of requests with identical length bucket, steps and guidance, one batch at a time on the device."""

    def __init__(
        self, model: DiffusionModel, options: EngineOptions, *, collect: Callable[[RunBatch], Batched]
    ) -> None:
        """`collect` turns a function over a batch into one over a request: `@serve.batch`, or `collect_here`."""
        self._model = model
        self._pipeline = Pipeline(model, replace(options, mode="fast"), policy=OneCall(), together=MAX_BATCH)
        self._collect = collect
        self._queues: dict[BatchKey, Batched] = {}
        self._device = asyncio.Lock()

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        key = batch_key(self._model, request)
        if key not in self._queues:
            self._queues[key] = self._collect(self._run)
        return await self._queues[key](request)

    async def close(self) -> None:
        for queue in self._queues.values():
            if isinstance(queue, Batcher):
                queue.close()
        await asyncio.to_thread(self._pipeline.close)

    async def _run(self, requests: list[GenerationRequest]) -> Sequence[GenerationResult]:
        async with self._device:
            return await self._pipeline.run(requests)


def batch_key(model: DiffusionModel, request: GenerationRequest) -> BatchKey:
    """What the requests of a batch have in common: the length bucket, and everything that shapes the steps."""
    spec = model.spec
    padding_s = (
        spec.card.default_duration_padding_s if request.duration_padding_s is None else request.duration_padding_s
    )
    frames = int((request.duration_s + padding_s) * spec.card.sample_rate_hz / spec.hop) + 1
    bucket = round_up(min(frames, spec.max_frames), _BUCKET_FRAMES.get(model.device.type, _BUCKET_FRAMES["cuda"]))
    is_edit = request.init_audio is not None, request.inpaint_audio is not None
    return bucket, request.steps, request.cfg_scale, request.sampler, request.negative_prompt is None, *is_edit


def collect_here(run: RunBatch) -> Batched:
    """Batches without Ray."""
    return Batcher(run, max_size=MAX_BATCH, wait_s=BATCH_WAIT_S)


class OurServer:
    """The engine."""

    def __init__(self, model: DiffusionModel, options: EngineOptions) -> None:
        self._engine = Engine(model, options)

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        return await self._engine.generate(request)

    async def close(self) -> None:
        await self._engine.close()


SIDES = ("lock", "static", "ours", "ours-strict", "ours-fast")


def open_side(
    name: str, model: DiffusionModel, *, options: EngineOptions, collect: Callable[[RunBatch], Batched] = collect_here
) -> Side:
    """Returns the side of this name over a loaded model. Raises ValueError for another name."""
    if name == "lock":
        return LockServer(model, options)
    if name == "static":
        return StaticServer(model, options, collect=collect)
    if name in SIDES:
        mode = name.removeprefix("ours").removeprefix("-") or options.mode
        return OurServer(model, replace(options, mode=mode))  # type: ignore[arg-type]  # strict or fast
    raise ValueError(f"no side is called {name!r}; there are {', '.join(SIDES)}")
