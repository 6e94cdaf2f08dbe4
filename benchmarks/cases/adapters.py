"""Measures throughput and waiting times with adapters (LoRA) of rank 16, with random weights of an official size."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import worst
from benchmarks.load import send_in_flight
from benchmarks.models import CaseSettings, build_random_model, write_adapters
from benchmarks.sides.pipeline import open_adapters
from stable_audio_serve.core.generation import GenerationRequest, Lora
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models.protocol import DiffusionModel

_MODEL = "small-music"
_COUNT = 8
_STRENGTHS = (0.25, 0.5, 0.75)
_REQUEST = GenerationRequest(prompt="warm analog pad, slow attack", duration_s=4.0, steps=4, seed=0)


async def measure(settings: CaseSettings) -> dict[str, Any]:
    """In each round, send eight requests without adapters at once, and then eight requests with one adapter each.

    The adapters are already in memory. The result is the worst round.
    """
    model = build_random_model(settings.model or _MODEL, device="cpu", dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        loras = write_adapters(model, Path(folder), count=_COUNT)
        waits = await _wait_times(model, loras, rounds=settings.rounds)
        plain = [replace(_REQUEST, seed=seed) for seed in range(_COUNT)]
        adapted = [replace(request, loras=(lora,)) for request, lora in zip(plain, loras, strict=True)]
        options = EngineOptions(
            mode=settings.mode, torch_threads=settings.threads, warmup_budget_s=0.0, max_queue_s=math.inf
        )
        async with Engine(model, options) as engine:
            for request in adapted:  # loads the adapters
                await engine.generate(replace(request, duration_s=0.5, steps=1))
            ratios = []
            for _ in range(settings.rounds):
                plain_s, adapted_s = [
                    (await send_in_flight(engine.generate, requests, num_in_flight=_COUNT))[-1]
                    for requests in (plain, adapted)
                ]
                ratios.append(plain_s / adapted_s)
    return {**worst("throughput_ratio", ratios, larger_is_better=True), **waits}


async def _wait_times(model: DiffusionModel, loras: Sequence[Lora], *, rounds: int) -> dict[str, float]:
    """Returns how long a request waits for the first load of an adapter, and for a new strength of a loaded one.

    Each time is the shortest of several measurements, because other programs can only add time. The first adapter is
    not counted, because its load also prepares the model.
    """
    adapters, evaluations = open_adapters(model, EngineOptions()), model.plan(_REQUEST)[0].sampler.evaluations

    async def wait_s(lora: Lora) -> float:
        started_at = time.perf_counter()
        held = await adapters.acquire(replace(_REQUEST, loras=(lora,)), evaluations)
        waited_s = time.perf_counter() - started_at
        held.release()
        return waited_s

    first, *others = loras
    await wait_s(first)
    loads = [await wait_s(lora) for lora in others[: rounds + 1]]
    strengths = [await wait_s(replace(first, strength=strength)) for strength in _STRENGTHS]
    adapters.close()
    return {"first_load_s": min(loads), "new_strength_ms": 1000.0 * min(strengths)}


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """Returns a table with one row."""
    return [
        {
            "throughput with adapters": results["throughput_ratio"],
            "first load (s)": results["first_load_s"],
            "new strength (ms)": results["new_strength_ms"],
        }
    ]
