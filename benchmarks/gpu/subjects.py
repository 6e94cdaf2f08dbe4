"""What is measured: models of the published shapes with random weights on the device, one in memory at a time, and the
sides that run them. On a CPU tiny checkpoints take their places.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

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

Result = TypeVar("Result")

_GOLDENS = Path(__file__).parents[2] / "tests" / "data" / "goldens"
_TINY = {"small": "sa3/sharp-s", "medium": "sa3/sharp-s", "open": "sao/tiny-small"}
_SA3 = {"small": "small-music", "medium": "medium"}
_OPEN = "stable-audio-open-1.0"
_QUEUE_S = 36_000.0  # nothing is refused, however slow the device


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    repeats: int = 20  # of one call, at most
    repeat_s: float = 2.0  # no further repeat after so many seconds ...
    least_repeats: int = 3  # ... but so many
    watched_steps: int = 2  # of a request alone, whose launches are counted
    profiled_steps: int = 200
    steps_per_trace: int = 25
    crowd: int = 16  # clips at once where eight rows or more share the device
    active: int = 48  # requests in flight while a busy device is profiled
    busy_before_s: float = 12.0  # while the engine captures a shape a second
    settled_requests: int = 200
    requests: int = 1000  # over which memory may not grow
    few_rows: tuple[int, int] = (1, 8)
    full_rows: int = 64
    pilot_requests: int = 6  # of a mix, to choose how long its lists are
    compared_clips: int = 3
    rounds: int = 3
    run_s: float = 4.0  # of one side on one list
    least_requests: int = 12  # of one list
    most_requests: int = 1000
    probes: int = 4  # of a search for goodput
    soak_s: float = 60.0
    duration_share: float = 1.0  # of the durations that stand in the tables
    most_steps: int = 1000
    models: tuple[str, ...] = ("small", "medium", "open")  # of which clips are measured
    warmup_s: float = 2.0  # of an engine
    eager_requests: int = 24  # of a list, for a lock that captures nothing
    clips_before: int = 3  # of a kind, before it is measured: calls are captured when they come again


TINY = Sizes(
    watched_steps=1, repeats=1, repeat_s=0.0, least_repeats=1, profiled_steps=4, steps_per_trace=2, crowd=2, active=2,
    settled_requests=1, requests=2, few_rows=(1, 2), full_rows=3, pilot_requests=1, compared_clips=1, rounds=1,
    run_s=0.0, least_requests=2, most_requests=2, probes=1, soak_s=0.0, duration_share=1 / 100, most_steps=4,
    warmup_s=0.01, models=("small", "open"), eager_requests=1, clips_before=1, busy_before_s=0.0,
)  # fmt: skip


@dataclass
class Bench:
    """A device, how much to measure on it, and the model that is loaded now."""

    device: torch.device
    sizes: Sizes
    _runner: asyncio.Runner = field(default_factory=asyncio.Runner)
    _loaded: tuple[tuple[str, torch.dtype], DiffusionModel] | None = None
    _sides: dict[str, Side] = field(default_factory=dict)
    warmed: set[str] = field(default_factory=set)  # mixes that every open side has seen

    @classmethod
    def on(cls, device: torch.device) -> Bench:
        """Returns a bench of full size on CUDA and a tiny one elsewhere."""
        return cls(device, Sizes() if device.type == "cuda" else TINY)

    @property
    def is_tiny(self) -> bool:
        """Whether the models are tiny checkpoints."""
        return self.device.type != "cuda"

    @property
    def options(self) -> EngineOptions:
        """Of the engine: batches as on CUDA on every device."""
        return EngineOptions(
            mode="fast",
            max_queue_s=_QUEUE_S,
            torch_threads=1 if self.is_tiny else None,
            warmup_budget_s=self.sizes.warmup_s,
        )

    @property
    def clips(self) -> list[ClipRow]:
        """The published rows to measure, model by model."""
        return [row for row in CLIPS if row.model in self.sizes.models]

    def model(self, name: str, dtype: torch.dtype = torch.float16) -> DiffusionModel:
        """Returns small, medium or open (Stable Audio Open 1.0), its denoiser in `dtype`; drops the one before."""
        key = name, dtype
        if self._loaded is None or self._loaded[0] != key:
            self.drop()
            self._loaded = key, self._load(name, dtype)
        return self._loaded[1]

    def side(self, model: str, side: str) -> Side:
        """Returns a side over a model; it stays open until another model is asked for."""
        loaded = self.model(model)
        if side not in self._sides:
            self._sides[side] = open_side(side, loaded, options=self.options)
        return self._sides[side]

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Returns what `work` returns; everything runs on one event loop."""
        return self._runner.run(work)

    def settle(self) -> None:
        """Wait until no side uses the device: an idle one may capture calls, beside whatever is measured then."""
        for side in self._sides.values():
            self.run(side.settle())

    def drop(self) -> None:
        """Close what is open and free the device's memory."""
        self.run(_close(list(self._sides.values())))
        self._sides.clear()
        self.warmed.clear()
        self._loaded = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Drop everything; the bench cannot be used afterwards."""
        self.drop()
        self._runner.close()

    def _load(self, name: str, dtype: torch.dtype) -> DiffusionModel:
        if self.is_tiny:
            folder = _GOLDENS / _TINY[name]
            return load_model(resolve_entry(folder.name, path=str(folder)), device=self.device)
        if name in _SA3:
            return sa3.build_random_model(_SA3[name], device=self.device, dtype=dtype)
        return sao.build_random_model(
            sao.OFFICIAL_CONFIGS[_OPEN], BUILT_IN[_OPEN].card, device=self.device, dtype=dtype
        )


async def _close(sides: Sequence[Side]) -> None:
    """Close sides and end what still waits for requests on this event loop."""
    for side in sides:
        await side.close()
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


def make_clip(bench: Bench, row: ClipRow, *, seed: int = 0) -> GenerationRequest:
    """Returns the request of a published row: without headroom, in the steps and guidance of its model."""
    card = bench.model(row.model).spec.card
    return GenerationRequest(
        prompt=PROMPTS[seed % len(PROMPTS)],
        duration_s=min(row.duration_s * bench.sizes.duration_share, card.max_duration_s),
        seed=seed,
        steps=min(card.default_steps, bench.sizes.most_steps),
        cfg_scale=card.default_cfg_scale,
        duration_padding_s=0.0,
    )
