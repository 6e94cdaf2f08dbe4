"""Loads models of the published sizes with random weights, opens the compared servers (sides) around them, and measures
time and memory. One model is in memory at a time. On a CPU, tiny checkpoints replace the models.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from benchmarks.gpu.published import CLIPS, ClipRow
from benchmarks.sides.servers import Side, open_side
from benchmarks.workload import PROMPTS
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.engine import EngineOptions
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.protocol import DiffusionModel
from stable_audio_serve.models.registry import BUILT_IN, resolve_entry
from stable_audio_serve.models.sa3 import random_weights as sa3
from stable_audio_serve.models.sao import random_weights as sao

_GOLDENS = Path(__file__).parents[2] / "tests" / "data" / "goldens"
_TINY = {"small": "sa3/sharp-s", "medium": "sa3/sharp-s", "open": "sao/tiny-small"}
_SA3 = {"small": "small-music", "medium": "medium"}
_OPEN = "stable-audio-open-1.0"
_QUEUE_S = 36_000.0  # length of the engine's queue, so long that no request is refused


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured: numbers of requests and repetitions, and times in seconds."""

    models: tuple[str, ...] = ("small", "medium", "open")
    most_s: float = 1000.0  # duration of the longest clip
    most_steps: int = 1000
    before: int = 3  # warm-up repetitions: only repeated calls are captured as CUDA graphs
    repeats: int = 20  # largest number of repetitions; after `repeat_s` no more begin, but at least three are made
    repeat_s: float = 2.0
    crowd: int = 16  # clips that are requested at once
    active: int = 48  # requests in flight while a busy device is profiled
    busy_before_s: float = 12.0  # warm-up before profiling: the engine captures about one CUDA graph a second
    traced_s: float = 2.0
    requests: tuple[int, int] = (200, 1000)  # memory must not grow between these numbers of requests
    few_rows: tuple[int, int] = (1, 8)
    full_rows: int = 64
    list_s: float = 4.0  # lists of requests are so long that the side `lock` needs about this time for one
    lists: tuple[int, int] = (12, 1000)  # smallest and largest number of requests in a list
    rounds: int = 3
    trials: int = 4  # number of rates that the search for goodput tries


_TINY_SIZES = Sizes(
    models=("small", "open"), most_s=1.0, most_steps=4, before=1, repeats=1, repeat_s=0.0, crowd=2, active=2,
    busy_before_s=0.0, traced_s=0.1, requests=(1, 2), few_rows=(1, 2), full_rows=3, list_s=0.0, lists=(2, 2), rounds=1,
    trials=1,
)  # fmt: skip


@dataclass
class Bench:
    """A device, how much to measure on it, and the currently loaded model."""

    device: torch.device
    _loaded: tuple[tuple[str, torch.dtype], DiffusionModel] | None = None
    _sides: dict[str, Side] = field(default_factory=dict)

    @property
    def is_tiny(self) -> bool:
        """Whether the models are tiny checkpoints."""
        return self.device.type != "cuda"

    @property
    def sizes(self) -> Sizes:
        """The amount of work: full on CUDA, tiny elsewhere."""
        return _TINY_SIZES if self.is_tiny else Sizes()

    @property
    def clips(self) -> list[ClipRow]:
        """The published clips to measure, sorted by model."""
        return [row for row in CLIPS if row.model in self.sizes.models]

    async def model(self, name: str, dtype: torch.dtype = torch.float16) -> DiffusionModel:
        """Return the model small, medium or open (Stable Audio Open 1.0) with its denoiser in `dtype`.

        If another model is loaded, unload it first.
        """
        key = name, dtype
        if self._loaded is None or self._loaded[0] != key:
            await self.drop()
            self._loaded = key, self._load(name, dtype)
        return self._loaded[1]

    async def side(self, model: str, side: str) -> Side:
        """Return the compared server `side` around a model. It stays open until another model is loaded."""
        loaded = await self.model(model)
        if side not in self._sides:
            threads = 1 if self.is_tiny else None
            options = EngineOptions(
                mode="fast", max_queue_s=_QUEUE_S, torch_threads=threads, warmup_budget_s=0.01 if self.is_tiny else 2.0
            )
            self._sides[side] = open_side(side, loaded, options=options)
        return self._sides[side]

    async def clip(self, row: ClipRow, *, seed: int = 0) -> GenerationRequest:
        """Return the request for a published clip, with its model's default steps and guidance.

        No padding is generated after the clip.
        """
        card = (await self.model(row.model)).spec.card
        return GenerationRequest(
            prompt=PROMPTS[seed % len(PROMPTS)],
            duration_s=min(row.duration_s, card.max_duration_s, self.sizes.most_s),
            seed=seed,
            steps=min(card.default_steps, self.sizes.most_steps),
            cfg_scale=card.default_cfg_scale,
            duration_padding_s=0.0,
        )

    async def settle(self) -> None:
        """Wait until no side uses the device. (An idle side may still capture CUDA graphs.)"""
        for side in self._sides.values():
            await side.settle()

    async def drop(self) -> None:
        """Close all sides and free the device's memory."""
        for side in self._sides.values():
            await side.close()
        self._sides.clear()
        self._loaded = None
        gc.collect()
        if not self.is_tiny:
            torch.cuda.empty_cache()

    async def times_ms(self, *runs: Callable[[], Awaitable[object]]) -> list[float]:
        """Return the median milliseconds of each function in `runs`. After a warm-up, they are called in turn."""
        for _ in range(self.sizes.before):
            for run in runs:
                await run()
        await self.settle()
        taken_ms: list[list[float]] = [[] for _ in runs]
        ends_at = time.perf_counter() + self.sizes.repeat_s * len(runs)
        while len(taken_ms[0]) < 3 or (len(taken_ms[0]) < self.sizes.repeats and time.perf_counter() < ends_at):
            for run, own in zip(runs, taken_ms, strict=True):
                started_at = time.perf_counter()
                await run()
                own.append((time.perf_counter() - started_at) * 1000.0)
        return [median(own) for own in taken_ms]

    def forget_peak(self) -> None:
        """Begin a new measurement of peak memory (`peak_bytes`). Has no effect on a CPU."""
        gc.collect()
        if not self.is_tiny:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        """Return the peak memory of tensors since `forget_peak`; on a CPU, the peak memory of the process."""
        if self.is_tiny:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return torch.cuda.max_memory_allocated(self.device)

    def held_bytes(self) -> int:
        """Return the memory of all current tensors; on a CPU, the peak memory of the process."""
        gc.collect()
        return self.peak_bytes() if self.is_tiny else torch.cuda.memory_allocated(self.device)

    def _load(self, name: str, dtype: torch.dtype) -> DiffusionModel:
        if self.is_tiny:
            folder = _GOLDENS / _TINY[name]
            return load_model(resolve_entry(folder.name, path=str(folder)), device=self.device)
        if name in _SA3:
            return sa3.build_random_model(_SA3[name], device=self.device, dtype=dtype)
        return sao.build_random_model(
            sao.OFFICIAL_CONFIGS[_OPEN], BUILT_IN[_OPEN].card, device=self.device, dtype=dtype
        )
