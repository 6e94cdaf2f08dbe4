"""Each side in one process: `await side.generate(request)`. `lock` works on one request at a time, first come first
served; `static` on batches of like requests; `ours` is the engine. Where the engine captures device calls, all do, but
`eager-lock`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from benchmarks.sides.batcher import Batcher
from benchmarks.sides.captures import Captures
from benchmarks.sides.pipeline import Pipeline
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.engine.hardware.device import Device
from stable_audio_serve.engine.scheduling.batching import BatchPolicy, Call, Lane, OneRowPerCall
from stable_audio_serve.engine.scheduling.call_shapes import GRAPH_ROWS, AnyRows, CallShapes, GraphShapes, round_up
from stable_audio_serve.models.protocol import DiffusionModel

MAX_BATCH = 32
BATCH_WAIT_S = 0.01
_SETTLED_S = (
    1.0  # an engine that has captured nothing for so long, while nothing was asked, has nothing left to capture
)
_BUCKET_FRAMES = {"cpu": 16, "cuda": 64}  # latent frames; narrower on a CPU, where padding costs as much as sound

BatchKey = tuple[object, ...]
Batched = Callable[[GenerationRequest], Awaitable[GenerationResult]]
RunBatch = Callable[[list[GenerationRequest]], Awaitable[Sequence[GenerationResult]]]


class Side(Protocol):
    """What is compared."""

    captures: Captures

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        """Returns the audio of one request."""
        ...

    async def settle(self) -> None:
        """Return when the side does nothing but wait; until then it may use its device to be faster later."""
        ...

    async def close(self) -> None:
        """Stop; nothing is in flight."""
        ...


@dataclass(frozen=True, slots=True)
class OneCall:
    """All rows of a batch in one device call of `shapes`, padded to the longest and, if it `pads`, to the shape."""

    shapes: CallShapes
    pads: bool = True

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        rows, frames = sum(lane.branches for lane in lanes), max(lane.frames for lane in lanes)
        return [Call(tuple(range(len(lanes))), self.shapes.least(rows), self.padded(frames))]

    def typical_rows(self, branches: int, frames: int) -> int:
        return branches

    def padded(self, frames: int) -> int:
        return self.shapes.padded(frames) if self.pads else frames


def one_call(model: DiffusionModel) -> Callable[[Device], BatchPolicy]:
    """Returns what chooses a device's policy. Captured calls must come again, so there they have the engine's shapes,
    for as many rows as a batch may have."""

    def choose(device: Device) -> BatchPolicy:
        if not device.can_capture:
            return OneCall(AnyRows())
        rows = *GRAPH_ROWS, 3 * MAX_BATCH // 2, 2 * MAX_BATCH
        return OneCall(GraphShapes(device.frame_grid, rows=rows), pads=model.spec.pads_rows)

    return choose


class LockServer:
    """The pipeline behind a mutex: what a handler around a model does."""

    def __init__(self, model: DiffusionModel, options: EngineOptions, *, captures_calls: bool = True) -> None:
        captured = one_call(model)
        self._pipeline = Pipeline(
            model,
            options,
            policy=lambda device: captured(device) if device.can_capture else OneRowPerCall(),
            together=1,
            captures_calls=captures_calls,
        )
        self.captures = self._pipeline.captures

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        return (await self._pipeline.run([request]))[0]

    async def settle(self) -> None:
        await self._pipeline.settle()

    async def close(self) -> None:
        await asyncio.to_thread(self._pipeline.close)


class StaticServer:
    """Batches of requests with identical length bucket, steps and guidance, one batch at a time on the device."""

    def __init__(
        self, model: DiffusionModel, options: EngineOptions, *, collect: Callable[[RunBatch], Batched]
    ) -> None:
        """`collect` turns a function over a batch into one over a request: `@serve.batch`, or `collect_here`."""
        self._model = model
        self._pipeline = Pipeline(model, replace(options, mode="fast"), policy=one_call(model), together=MAX_BATCH)
        self.captures = self._pipeline.captures
        self._collect = collect
        self._queues: dict[BatchKey, Batched] = {}

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        key = batch_key(self._model, request)
        if key not in self._queues:
            self._queues[key] = self._collect(self._run)
        return await self._queues[key](request)

    async def settle(self) -> None:
        await self._pipeline.settle()

    async def close(self) -> None:
        for queue in self._queues.values():
            if isinstance(queue, Batcher):
                queue.close()
        await asyncio.to_thread(self._pipeline.close)

    async def _run(self, requests: list[GenerationRequest]) -> Sequence[GenerationResult]:
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
        self.captures = Captures()
        self._engine = Engine(model, options, metrics=self.captures)

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        return await self._engine.generate(request)

    async def settle(self) -> None:
        await wait_for_captures(self.captures)

    async def close(self) -> None:
        await self._engine.close()


async def wait_for_captures(captures: Captures) -> None:
    """Return once an engine of which nothing is asked has captured what it wants to."""
    while time.monotonic() < captures.changed_at + _SETTLED_S:  # noqa: ASYNC110 - another thread captures
        await asyncio.sleep(0.05)


SIDES = ("lock", "eager-lock", "static", "ours", "ours-strict", "ours-fast")


def open_side(
    name: str, model: DiffusionModel, *, options: EngineOptions, collect: Callable[[RunBatch], Batched] = collect_here
) -> Side:
    """Returns the side of this name over a loaded model. Raises ValueError for another name."""
    if name in {"lock", "eager-lock"}:
        return LockServer(model, options, captures_calls=name == "lock")
    if name == "static":
        return StaticServer(model, options, collect=collect)
    if name in SIDES:
        mode = name.removeprefix("ours").removeprefix("-") or options.mode
        return OurServer(model, replace(options, mode=mode))  # type: ignore[arg-type]  # strict or fast
    raise ValueError(f"no side is called {name!r}; there are {', '.join(SIDES)}")
