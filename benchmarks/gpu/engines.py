"""Models with random weights, and engines with single features switched on or off.

The models have the published shapes on CUDA. On a CPU, tiny checkpoints replace them.

This is the only module of this folder that imports internal modules of the engine.
"""

from __future__ import annotations

import asyncio
import gc
import resource
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.load import Audio
from benchmarks.models import GOLDENS, build_random_model
from benchmarks.sides.servers import OurServer
from stable_audio_serve.core.catalog import DecodePrecision
from stable_audio_serve.core.clock import SystemClock
from stable_audio_serve.core.generation import GenerationRequest, Mode
from stable_audio_serve.engine import EngineOptions
from stable_audio_serve.engine.hardware.device import Device, open_device
from stable_audio_serve.engine.options import Features
from stable_audio_serve.models.compiled import compile_layers
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.protocol import DiffusionModel
from stable_audio_serve.models.registry import resolve_entry

_TINY = {"small": "sa3/sharp-s", "medium": "sa3/sharp-l", "open": "sao/tiny-1.0"}
_OFFICIAL = {"small": "small-music", "medium": "medium", "open": "stable-audio-open-1.0"}
_BEFORE_CAPTURES = 3  # only repeated calls are captured
_QUEUE_S = 36_000.0  # long enough that no request is refused on any device

# With these features, an engine in strict mode must give the same bytes as without any.
EXACT = frozenset({"async_copies", "second_queue", "captures"})
ALL = EXACT | {"packed_rows", "fused_kernels"}
PLAIN: frozenset[str] = frozenset()

OpenDevice = Callable[[torch.device], Device]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured: numbers of clips and repetitions, and times in seconds."""

    longest_s: float = 400.0
    most_steps: int = 100
    repeats: int = 12
    together: int = 8  # clips of equal length that are requested at once
    clips: int = 24  # different clips of the mixed load
    load_s: float = 60.0
    in_flight: int = 24
    traced_s: float = 2.0
    few: int = 50  # number of clips before the first measurement of memory
    many: int = 500  # number of clips before the last measurement of memory


_TINY_SIZES = Sizes(
    longest_s=1.0, most_steps=4, repeats=1, together=2, clips=3, load_s=1.0, in_flight=2, traced_s=0.2, few=2, many=4
)


@dataclass(frozen=True, slots=True)
class Machine:
    """The measured device. `open` returns a new object for each engine, through which the engine uses the device."""

    device: torch.device
    open: OpenDevice = lambda device: open_device(device, clock=SystemClock())

    @property
    def is_tiny(self) -> bool:
        """Whether tiny checkpoints replace the models."""
        return self.device.type != "cuda"

    @property
    def sizes(self) -> Sizes:
        """Full on CUDA, tiny elsewhere."""
        return _TINY_SIZES if self.is_tiny else Sizes()

    def load(
        self, name: str, *, dtype: torch.dtype = torch.float16, decode: DecodePrecision | None = "float32"
    ) -> DiffusionModel:
        """Returns the model `name`: small, medium or open (Stable Audio Open 1.0). The weights are the same each time.

        `dtype` is the denoiser's precision on CUDA. `decode` is the decoder's precision. None selects the precision
        that the server would use.
        Raises ConfigError for a precision that the device does not have.
        """
        if self.is_tiny:
            folder = GOLDENS / _TINY[name]
            return load_model(resolve_entry(folder.name, path=str(folder)), device=self.device, decode_precision=decode)
        try:
            return build_random_model(_OFFICIAL[name], device=self.device, dtype=dtype, decode_precision=decode)
        finally:
            self.free()  # the weights were float32 at first

    def compiled(self, model: DiffusionModel) -> DiffusionModel:
        """Returns the model with compiled layers. On a CPU, the compiler's back end is one that compiles nothing."""
        return compile_layers(model, backend="eager" if self.is_tiny else "inductor")

    def engine(
        self, model: DiffusionModel, features: Collection[str] = ALL, *, mode: Mode = "fast"
    ) -> AbstractAsyncContextManager[OpenEngine]:
        """Start an engine with these features only, and close it at the end.

        Callers delete their variable afterwards. Otherwise the next engine would find less free memory.
        """
        device = cast("Device", _Switched(self.open(self.device), features))
        options = EngineOptions(
            mode=mode,
            frame_grid=None if "packed_rows" in features else device.frame_grid,  # with a grid, rows are padded
            features=Features(fused_kernels="fused_kernels" in features),
            profile="accelerated",  # uses the features without checking them first; the benchmark itself checks them
            max_queue_s=_QUEUE_S,
            warmup_budget_s=2.0 if features == ALL and not self.is_tiny else 0.0,
            torch_threads=1 if self.is_tiny else None,
        )
        return self._running(model, options, device)

    def served(self, model: DiffusionModel) -> AbstractAsyncContextManager[OpenEngine]:
        """Start an engine with the options of a server, which checks its features at start, and close it at the end."""
        return self._running(model, EngineOptions(), self.open(self.device))

    @asynccontextmanager
    async def _running(  # noqa: PLR0917
        self, model: DiffusionModel, options: EngineOptions, device: Device
    ) -> AsyncIterator[OpenEngine]:
        self.free()  # torch keeps the memory of the last engine, which the new engine would count as taken
        engine = OpenEngine(model, options, device=device)
        async with engine:
            yield engine

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def memory_bytes(self) -> dict[str, int]:
        """Returns the GPU memory that tensors use, its peak since the last call, and the memory that torch reserves.

        Also returns the peak of this process's host memory. On a CPU, returns only this.
        """
        gc.collect()
        host = {"host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        if self.device.type != "cuda":
            return host
        held, peak = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return {"held": held, "peak": peak, "reserved": torch.cuda.memory_reserved(self.device)} | host


class OpenEngine(OurServer):
    """A measured engine."""

    def __init__(self, model: DiffusionModel, options: EngineOptions, *, device: Device) -> None:
        super().__init__(model, options, device=device)
        self.can_capture = device.can_capture

    async def prepare(self, *requests: GenerationRequest) -> None:
        """Send the requests together a few times, and wait until CUDA graphs of their device calls are captured."""
        for _ in range(_BEFORE_CAPTURES):
            await self.together(*requests)
        await self.settle()

    async def together(self, *requests: GenerationRequest) -> list[Audio]:
        """Send all requests at once. Returns the first clip of each."""
        return [result.audio[0] for result in await asyncio.gather(*map(self.generate, requests))]


class _Switched:
    """Wraps a device, and switches off the features that are not in `features`."""

    def __init__(self, device: Device, features: Collection[str]) -> None:
        self._device = device
        self._copies_late = "async_copies" in features
        self.can_capture = device.can_capture and "captures" in features
        self.has_second_queue = device.has_second_queue and "second_queue" in features

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def restricted(self, _: Features) -> Device:
        return cast("Device", self)

    def host_buffer(self, *shape: int, dtype: torch.dtype) -> Tensor:
        # The device copies unpinned memory before the call returns.
        return self._device.host_buffer(*shape, dtype=dtype) if self._copies_late else torch.empty(shape, dtype=dtype)

    def upload(self, host: Tensor) -> Tensor:
        return self._device.upload(host) if self._copies_late else host.to(self._device.torch_device, copy=True)

    def download(self, source: Tensor, target: Tensor) -> None:
        if self._copies_late:
            self._device.download(source, target)
        else:
            target.copy_(source)

    def on_second_queue(self, *reads: Tensor) -> AbstractContextManager[None]:
        return self._device.on_second_queue(*reads) if self.has_second_queue else nullcontext()
