"""What a model computes on one CPU thread against several: the official size with random weights, one clip at a time.

The bytes must be the same, or the comparison is void.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.settings import CaseSettings
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.models.sa3.random_weights import build_random_model

_MODEL = "small-music"
_COUNTS = (1, 2)
_REQUEST = GenerationRequest(prompt="warm analog pad, slow attack", duration_s=10.0, seed=7)


def run_threads_case(settings: CaseSettings) -> dict[str, Any]:
    """One thread, then two, `rounds` clips each. Raises RuntimeError if the audio differs."""
    model = build_random_model(settings.model or _MODEL, device="cpu", dtype=torch.float32)
    results = {count: asyncio.run(_measure(model, count, rounds=settings.rounds)) for count in _COUNTS}
    audio = [result.audio[0] for result, _ in results.values()]
    if not all(np.array_equal(audio[0], other) for other in audio[1:]):
        raise RuntimeError("the audio differs between the numbers of threads: the comparison is void")
    work_s = {count: median(seconds) / _REQUEST.duration_s for count, (_, seconds) in results.items()}
    return {
        "model": {"device": "cpu", "weights": "random", **asdict(model.spec)},
        "clip_s": _REQUEST.duration_s,
        "steps": model.spec.default_steps,
        "seconds": {str(count): seconds for count, (_, seconds) in results.items()},
        "work_s_per_audio_s": {str(count): value for count, value in work_s.items()},
        "speedup": {str(count): work_s[1] / value for count, value in work_s.items()},
    }


async def _measure(model: Sa3Model, num_threads: int, *, rounds: int) -> tuple[GenerationResult, list[float]]:
    """The audio, and the seconds of each generation but the first."""
    async with Engine(model, EngineOptions(mode="strict", torch_threads=num_threads, warmup_budget_s=0.0)) as engine:
        result = await engine.generate(_REQUEST)
        seconds = []
        for _ in range(rounds):
            started_at = time.perf_counter()
            await engine.generate(_REQUEST)
            seconds.append(time.perf_counter() - started_at)
        return result, seconds
