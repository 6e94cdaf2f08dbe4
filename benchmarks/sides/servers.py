"""The compared servers (sides) without HTTP: `await side.generate(request)`.

`lock` serves one request at a time, first come, first served. `static` serves batches of similar requests. All requests
of a batch have the same adapters. `fold` works like `lock`, but folds adapters into the weights. `ours` is the engine.
If the engine uses CUDA graphs on a device, the other sides use them, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.sides.pipeline import Captures, Pipeline, wait_for_captures
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, Lora
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.engine.hardware.device import Device
from stable_audio_serve.engine.scheduling.batching import (
    GRAPH_ROWS,
    AnyRows,
    BatchPolicy,
    Call,
    GraphShapes,
    Lane,
    OneRowPerCall,
)
from stable_audio_serve.models.adapters.fold import Slot
from stable_audio_serve.models.protocol import DiffusionModel
from stable_audio_serve.models.windows import round_up

MAX_BATCH = 32
BATCH_WAIT_S = 0.01
# Width of a length bucket in latent frames, by device. Narrower on a CPU, where padding is as expensive as audio.
_BUCKET_FRAMES = {"cpu": 16, "cuda": 64}

BatchKey = tuple[object, ...]
Batched = Callable[[GenerationRequest], Awaitable[GenerationResult]]
RunBatch = Callable[[Sequence[GenerationRequest]], Awaitable[Sequence[GenerationResult]]]


@dataclass(frozen=True, slots=True)
class OneCall:
    """A batch policy: all rows share one device call, which is padded to the next number of rows in `shapes`.

    All rows are padded to the length of the longest row. If `pads` is true, they are padded further to a length in
    `shapes`.
    """

    shapes: AnyRows
    pads: bool = True

    def split(self, lanes: Sequence[Lane]) -> list[Call]:
        rows, frames = sum(lane.branches for lane in lanes), max(lane.frames for lane in lanes)
        return [Call(tuple(range(len(lanes))), self.shapes.least(rows), self.padded(frames))]

    def typical_rows(self, branches: int, frames: int) -> int:
        return branches

    def padded(self, frames: int) -> int:
        return self.shapes.padded(frames) if self.pads else frames


def one_call(model: DiffusionModel, device: Device) -> BatchPolicy:
    """Returns the policy OneCall for a device.

    Calls have the engine's shapes if the device captures CUDA graphs, because a graph needs calls of the same shape.
    """
    if not device.can_capture:
        return OneCall(AnyRows())
    rows = *GRAPH_ROWS, 3 * MAX_BATCH // 2, 2 * MAX_BATCH
    return OneCall(GraphShapes(device.frame_grid, rows=rows), pads=model.spec.pads_rows)


class LockServer(Pipeline):
    """The compared server `lock`: serves one request at a time, like a simple request handler around a model."""

    def __init__(self, model: DiffusionModel, options: EngineOptions) -> None:
        super().__init__(
            model,
            options,
            policy=lambda device: one_call(model, device) if device.can_capture else OneRowPerCall(),
            together=1,
        )

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        return (await self.run([request]))[0]


class FoldServer(LockServer):
    """The compared server `fold`: works like `lock`, but folds adapters into the network's weights.

    If a request has other adapters than the request before it, the weights are changed first.
    """

    def __init__(self, model: DiffusionModel, options: EngineOptions) -> None:
        super().__init__(model, options)
        self._layers = self._adapters.base.layers
        self._plain = {name: layer.weight.clone() for name, layer in self._layers.items()}
        self._folded: tuple[Lora, ...] = ()
        self._order = asyncio.Lock()

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        async with self._order:
            if request.loras != self._folded:
                slots = await self._adapters.acquire(request, self._model.plan(request)[0].sampler.evaluations)
                await asyncio.to_thread(self._fold, slots.by_evaluation[0] if slots.by_evaluation else None)
                slots.release()
                self._folded = request.loras
            return await super().generate(replace(request, loras=()))

    async def settle(self) -> None:
        """Restore the weights, which other sides share."""
        self._fold(None)
        self._folded = ()
        await super().settle()

    def _fold(self, slot: Slot | None) -> None:
        with torch.inference_mode():
            for name, layer in self._layers.items():
                weight, own = self._plain[name], slot and slot.layers.get(name)
                if own:
                    weight = own.scale[:, None].to(weight) * weight.flatten(1) + own.b @ own.a
                layer.weight.copy_(weight.view_as(layer.weight))


class StaticServer(Pipeline):
    """The compared server `static`: runs one batch at a time.

    The requests of a batch have the same length bucket, steps and guidance.
    """

    def __init__(
        self, model: DiffusionModel, options: EngineOptions, *, collect: Callable[[RunBatch], Batched]
    ) -> None:
        """`collect` is `@serve.batch` or `Batcher`. It turns a function of a batch into a function of one request."""
        super().__init__(model, replace(options, mode="fast"), policy=partial(one_call, model), together=MAX_BATCH)
        self._collect = collect
        self._queues: dict[BatchKey, Batched] = {}

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        key = batch_key(self._model, request)
        if key not in self._queues:
            self._queues[key] = self._collect(self.run)
        return await self._queues[key](request)


def batch_key(model: DiffusionModel, request: GenerationRequest) -> BatchKey:
    """Returns the values that all requests of a batch have in common.

    They are the length bucket and everything that affects the steps.
    """
    spec = model.spec
    padding_s = (
        spec.card.default_duration_padding_s if request.duration_padding_s is None else request.duration_padding_s
    )
    frames = int((request.duration_s + padding_s) * spec.card.sample_rate_hz / spec.hop) + 1
    bucket = round_up(min(frames, spec.max_frames), _BUCKET_FRAMES.get(model.device.type, _BUCKET_FRAMES["cuda"]))
    is_edit = request.init_audio is not None, request.inpaint_audio is not None
    guidance = request.cfg_scale, request.negative_prompt is None
    return bucket, request.steps, *guidance, request.sampler, request.loras, *is_edit


class Batcher:
    """Collects calls into batches. Replaces `@serve.batch` on machines without Ray.

    A batch waits a short time after its first call for more calls. While a batch runs, new calls are collected for the
    next one. An error of a batch is raised in each of its calls.
    """

    def __init__(self, run: RunBatch) -> None:
        self._run = run
        self._waiting: asyncio.Queue[tuple[GenerationRequest, asyncio.Future[GenerationResult]]] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, request: GenerationRequest) -> GenerationResult:
        """Returns the result of this request, after the batch with it has run."""
        future: asyncio.Future[GenerationResult] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((request, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while not self._waiting.empty():
            batch = [self._waiting.get_nowait()]
            with suppress(TimeoutError):
                async with asyncio.timeout(BATCH_WAIT_S):
                    while len(batch) < MAX_BATCH:
                        batch.append(await self._waiting.get())
            try:
                results = await self._run([item for item, _ in batch])
            except Exception as error:  # noqa: BLE001 - belongs to the callers
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)


class OurServer(Engine):
    """The compared servers `ours`, `ours-strict` and `ours-fast`: the engine."""

    def __init__(self, model: DiffusionModel, options: EngineOptions, *, device: Device | None = None) -> None:
        self.captures = Captures()
        super().__init__(model, options, device=device, metrics=self.captures)

    async def settle(self) -> None:
        await wait_for_captures(self.captures)


Side = LockServer | StaticServer | OurServer
SIDES = ("lock", "static", "fold", "ours", "ours-strict", "ours-fast")


def open_side(
    name: str, model: DiffusionModel, *, options: EngineOptions, collect: Callable[[RunBatch], Batched] = Batcher
) -> Side:
    """Returns the compared server `name`, one of `SIDES`, which runs `model`."""
    if name == "static":
        return StaticServer(model, options, collect=collect)
    if name in ("lock", "fold"):
        return (LockServer if name == "lock" else FoldServer)(model, options)
    mode = name.removeprefix("ours").removeprefix("-") or options.mode
    return OurServer(model, replace(options, mode=mode))  # type: ignore[arg-type]  # the mode is strict or fast
