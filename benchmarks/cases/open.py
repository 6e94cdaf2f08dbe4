"""Stable Audio Open in the engine: eight unlike requests at once against one after another, and what noise costs.

The network is a narrow one with random weights, but its window is the published 1.0's (1024 frames of 64 channels), so
that the share of the time that goes into drawing noise is larger here than with the real network.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.cases.engine import run_engine_case
from benchmarks.settings import CaseSettings
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models.registry import BUILT_IN
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.models.sao.random_weights import OFFICIAL_CONFIGS, build_random_model
from stable_audio_serve.sampling import SeededNoise

_MODEL = "stable-audio-open-1.0"
_NARROW = {"embed_dim": 256, "depth": 4, "num_heads": 4, "project_cond_tokens": True}
_NARROW_CHANNELS = 16
_LONG = GenerationRequest(prompt="warm house synth loop 120 bpm", duration_s=10.0, seed=7, steps=100, cfg_scale=7.0)


class TimedNoise(SeededNoise):
    """A row's noise that adds up the seconds it takes to draw."""

    drawing_s = 0.0

    def step(self, shape: tuple[int, ...]) -> torch.Tensor:
        started_at = time.thread_time()
        drawn = super().step(shape)
        TimedNoise.drawing_s += time.thread_time() - started_at
        return drawn


def build_narrow_model(device: str) -> SaoModel:
    """The 1.0's window and conditioning around a network that two cores can run a hundred steps of."""
    values = copy.deepcopy(OFFICIAL_CONFIGS[_MODEL])
    values["model"]["diffusion"]["config"] |= _NARROW
    for coder in ("encoder", "decoder"):
        values["model"]["pretransform"]["config"][coder]["config"]["channels"] = _NARROW_CHANNELS
    return build_random_model(values, BUILT_IN[_MODEL].card, device=device, dtype=torch.float32)


async def run_open_case(settings: CaseSettings) -> dict[str, Any]:
    """Raises RuntimeError if the audio of the two sides differs."""
    model = build_narrow_model(settings.device)
    mixed = await run_engine_case(model, settings)
    shares = [await _noise_share(model, settings) for _ in range(settings.rounds)]
    return mixed | {"noise": shares, "worst_noise_share": max(share["share"] for share in shares)}


async def _noise_share(model: SaoModel, settings: CaseSettings) -> dict[str, float]:
    """Processor time of drawing over that of a request of 100 guided steps."""
    options = EngineOptions(mode=settings.mode, torch_threads=settings.threads, warmup_budget_s=0.0)  # type: ignore[arg-type]
    async with Engine(model, options, noise_factory=TimedNoise) as engine:
        TimedNoise.drawing_s, started_at = 0.0, time.process_time()
        await engine.generate(_LONG)
        request_s = time.process_time() - started_at
    return {"drawing_s": TimedNoise.drawing_s, "request_s": request_s, "share": TimedNoise.drawing_s / request_s}


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """The same for Stable Audio Open, and the share of noise in a long request."""
    return [
        {
            "mode": results["mode"],
            "throughput_ratio": results["throughput_ratio"],
            "mean_latency_ratio": results["mean_latency_ratio"],
            "largest_difference": f"{results['largest_difference']:.1e}",
            "noise_share": f"{results['worst_noise_share']:.4f}",
        }
    ]
