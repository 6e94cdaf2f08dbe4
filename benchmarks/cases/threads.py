"""Compares the speed of a model of an official size on one CPU thread and on several threads, one clip at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.compare import LARGEST_DIFFERENCE
from benchmarks.load import Audio
from benchmarks.models import CaseSettings, build_random_model
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.engine import Engine, EngineOptions

_MODEL = "small-music"
_COUNTS = (1, 2)
_REQUEST = GenerationRequest(prompt="warm analog pad, slow attack", duration_s=10.0, seed=7)


async def measure(settings: CaseSettings) -> dict[str, Any]:
    """Generate `settings.rounds` clips with each number of threads, in alternation.

    The result is the shortest time, because other programs can only add time. Raises RuntimeError if the audio differs
    by more than rounding.
    """
    model = build_random_model(settings.model or _MODEL, device="cpu", dtype=torch.float32)
    seconds: dict[int, list[float]] = {count: [] for count in _COUNTS}
    audio: list[Audio] = []
    for _ in range(settings.rounds):
        for count in _COUNTS:
            options = EngineOptions(mode="strict", torch_threads=count, warmup_budget_s=0.0)
            async with Engine(model, options) as engine:
                started_at = time.perf_counter()
                audio.append((await engine.generate(_REQUEST)).audio[0])
                seconds[count].append(time.perf_counter() - started_at)
    difference = max(float(np.abs(audio[0] - other).max()) for other in audio[1:])
    if difference > LARGEST_DIFFERENCE:
        raise RuntimeError(f"the audio of different numbers of threads differs by {difference:.2g}: no fair comparison")
    work_s = {count: min(taken) / _REQUEST.duration_s for count, taken in seconds.items()}
    return {
        "largest_difference": difference,
        "seconds": {str(count): taken for count, taken in seconds.items()},
        "work_s_per_audio_s": {str(count): value for count, value in work_s.items()},
        "speedup": {str(count): work_s[1] / value for count, value in work_s.items()},
    }


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """Returns a table with one row for each number of threads."""
    return [
        {"threads": count, "work per second of audio (s)": value, "speedup": results["speedup"][count]}
        for count, value in results["work_s_per_audio_s"].items()
    ]
