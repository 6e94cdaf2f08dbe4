"""Whether replicas that Ray may put on one GPU together have more than all of its memory between them. Pure arithmetic.

Ray counts GPUs in ten thousandths and packs replicas while their fractions fit; it knows nothing of memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from stable_audio_serve.core.errors import ConfigError

_PARTS = 10_000  # of a GPU: Ray's own precision
_WHOLE = 1 + 1e-9


@dataclass(frozen=True, slots=True)
class GpuReplicas:
    """Up to `count` replicas of a model, each with `gpu` of a GPU, 0..1, and `memory` of that GPU's memory, 0..1."""

    model: str
    gpu: float
    memory: float
    count: int


def check_shares(models: Iterable[GpuReplicas]) -> None:
    """Raises ConfigError naming the replicas that fit on one GPU by their GPUs and not by their memory."""
    models = [model for model in models if model.gpu > 0]
    if all(model.memory <= model.gpu * _WHOLE for model in models):
        return
    fullest = _fullest(models)
    memory = {model.model: model.memory for model in models}
    total = sum(count * memory[name] for name, count in fullest.items())
    if total > _WHOLE:
        gpu = {model.model: model.gpu for model in models}
        listed = ", ".join(
            f"{count} of {name} (num_gpus {gpu[name]:g}, memory_share {memory[name]:g})"
            for name, count in sorted(fullest.items())
        )
        raise ConfigError(
            f"memory_share: on one GPU there may be {listed}: together {total:.4g} of its memory; "
            "lower memory_share, or raise num_gpus",
            field="memory_share",
        )


def _fullest(models: list[GpuReplicas]) -> Counter[str]:
    """Returns how many replicas of each model take the most memory of a GPU on which they all fit."""
    sizes = [max(1, round(model.gpu * _PARTS)) for model in models]
    unit = math.gcd(_PARTS, *sizes)
    room = _PARTS // unit
    best: list[tuple[float, tuple[tuple[str, int], ...]]] = [(0.0, ())] * (room + 1)  # by what is taken of the GPU
    for model, size in zip(models, sizes, strict=True):
        for count in _bundles(min(model.count, _PARTS // size)):
            taken = count * size // unit
            for place in range(room, taken - 1, -1):
                memory, chosen = best[place - taken]
                if memory + count * model.memory > best[place][0]:
                    best[place] = memory + count * model.memory, (*chosen, (model.model, count))
    fullest = Counter[str]()
    for name, count in best[room][1]:
        fullest[name] += count
    return fullest


def _bundles(count: int) -> Iterator[int]:
    """Yields numbers of which some add up to each number up to `count`: 1, 2, 4, ... and a rest."""
    size = 1
    while count > 0:
        yield min(size, count)
        count -= size
        size *= 2
