"""What `dtype: bfloat16` is worth on a CPU: the official size with random weights, eight steps and the decode of a 5 s
clip in float32 and in bfloat16 in turns, on every core. And what four rows in one call are worth beside four calls.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.compare.quiet import describe_quiet, measure_in_quiet
from benchmarks.metrics import worst_ratio
from benchmarks.settings import CaseSettings
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.models.protocol import BranchConditioning, DecodeWindow, StepBatch
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.models.sa3.random_weights import build_random_model
from stable_audio_serve.models.weights import resolve_dtype
from stable_audio_serve.sampling.noise import SeededNoise

_MODEL = "small-music"
_STEPS, _FRAMES, _ROWS = 8, 64, 4  # 5 s are 54 frames, on the grid 64
_PRECISIONS = ("float32", "bfloat16")
_REQUEST = GenerationRequest(prompt="warm analog pad, slow attack", duration_s=5.0, seed=7, duration_padding_s=0.0)


class Clip:
    """One clip's device calls; beside a denoiser in bfloat16 the decoder has the precision half."""

    def __init__(self, precision: str) -> None:
        device = torch.device("cpu")
        self.model: Sa3Model = build_random_model(
            _MODEL,
            device=device,
            dtype=resolve_dtype(device, precision),
            decode_precision="float32" if precision == "float32" else "half",
        )
        plan = self.model.plan(_REQUEST)[0]
        prompt = self.model.encode_text([plan.prompt])[0]
        conditioning = self.model.condition(plan, prompt=prompt, negative=None, inpaint_latents=None)
        self._branch: BranchConditioning = conditioning.conditional
        self._latents = torch.randn(256, _FRAMES, generator=torch.Generator().manual_seed(0))

    def step(self, rows: int) -> Tensor:
        """(rows, 256, 64) float32."""
        x = self._latents.expand(rows, -1, -1)
        valid = torch.ones(rows, _FRAMES, dtype=torch.bool)
        return self.model.denoise(
            StepBatch.of(x, t=torch.full((rows,), 0.5), valid=valid, branches=[self._branch] * rows)
        )

    def decode(self) -> Tensor:
        """(2, 64 * 4096) float32."""
        return self.model.decode([DecodeWindow(self._latents, 0, SeededNoise(1))])[0]


def run_bfloat16_case(settings: CaseSettings) -> dict[str, Any]:
    """The worse round counts. Raises ConfigError where the processor does not compute in bfloat16 itself."""
    torch.set_num_threads(os.cpu_count() or 1)
    clips = {precision: Clip(precision) for precision in _PRECISIONS}
    calls: dict[str, Callable[[Clip], Tensor]] = {
        "step": lambda clip: clip.step(1),
        "decode": Clip.decode,
        "rows_step": lambda clip: clip.step(_ROWS),
    }
    outputs = {name: [call(clip) for clip in clips.values()] for name, call in calls.items()}
    measured = [measure_in_quiet(partial(_measure, clips, calls)) for _ in range(settings.rounds)]
    rounds = [one for one, _ in measured]
    clip_s = [tuple(_STEPS * one[name]["step"] + one[name]["decode"] for name in _PRECISIONS) for one in rounds]
    together = {name: [(_ROWS * one[name]["step"], one[name]["rows_step"]) for one in rounds] for name in _PRECISIONS}
    return {
        "model": _MODEL,
        "frames": _FRAMES,
        "steps": _STEPS,
        "threads": torch.get_num_threads(),
        "best_ms": {
            name: {call: 1000.0 * min(one[name][call] for one in rounds) for call in calls} for name in _PRECISIONS
        },
        "over_float32_ratio": worst_ratio([(half, exact) for exact, half in clip_s], larger_is_better=False),
        "over_float32_ratio_rounds": [half / exact for exact, half in clip_s],
        "rows_together_ratio": {name: worst_ratio(pairs, larger_is_better=True) for name, pairs in together.items()},
        "rows_together_ratio_rounds": {
            name: [alone / shared for alone, shared in pairs] for name, pairs in together.items()
        },
        "snr_db": {name: _snr_db(half, exact) for name, (exact, half) in outputs.items()},
        **describe_quiet([watch for _, watch in measured]),
    }


def _measure(clips: Mapping[str, Clip], calls: Mapping[str, Callable[[Clip], Tensor]]) -> dict[str, dict[str, float]]:
    """Seconds by precision and call, each the better of two."""
    seconds: dict[str, dict[str, float]] = {name: {} for name in clips}
    for call, run in calls.items():
        for _ in range(2):
            for name, clip in clips.items():
                started_at = time.perf_counter()
                run(clip)
                taken_s = time.perf_counter() - started_at
                seconds[name][call] = min(taken_s, seconds[name].get(call, math.inf))
    return seconds


def _snr_db(actual: Tensor, expected: Tensor) -> float:
    return 20.0 * math.log10(float(expected.norm() / (actual - expected).norm()))


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """Times by precision."""
    return [
        {
            "precision": name,
            "step_ms": times["step"],
            "decode_ms": times["decode"],
            "clip_over_float32": results["over_float32_ratio"] if name != "float32" else 1.0,
            "four_rows_together_over_alone": results["rows_together_ratio"][name],
        }
        for name, times in results["best_ms"].items()
    ]
