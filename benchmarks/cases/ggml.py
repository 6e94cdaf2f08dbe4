"""Compares this engine with sa3.cpp (ggml) on a CPU. Each clip is the only one of a new process.

The result is the smallest value of each figure in all rounds, because other programs can only make it larger. Therefore
no round is repeated when other programs were busy. benchmarks/results/README.md says more about the figures.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.models import CaseSettings
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.core.processor import has_native_bfloat16
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.registry import resolve_entry
from stable_audio_serve.serving.placement import allocator_variables

Figures = dict[str, float]

_CLIPS_S = (12, 30)
_STEPS = 4
_THEIRS = "sa3.cpp F16"
_PRECISIONS = {"float32": "float32", "bfloat16": "half"}  # the decoder's precision, by the denoiser's dtype


async def measure(settings: CaseSettings) -> dict[str, Any]:
    """Measure both programs `settings.rounds` times. Raises ValueError without weights, or if a program fails."""
    if settings.weights is None:
        raise ValueError("--weights is missing: a checkpoint folder, with sa3.cpp's GGUF files of the same weights")
    model = settings.model or "small-music"
    runs: dict[str, list[Figures]] = {_THEIRS: []} if settings.binary else {}
    runs |= {dtype: [] for dtype in _PRECISIONS if dtype == "float32" or has_native_bfloat16()}
    for _ in range(settings.rounds):
        for side, own in runs.items():
            if side == _THEIRS:
                own.append(_run_theirs(settings, model=model))
            else:
                own.append(_run_ours(settings.weights, model, dtype=side, threads=settings.threads))
    best = {side: {name: min(run[name] for run in own) for name in own[0]} for side, own in runs.items()}
    return {"model": model, "steps": _STEPS, "sides": best, "rounds": runs}


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """Returns a table with one row for each figure. In brackets: the ratio to sa3.cpp."""
    sides = results["sides"]
    theirs = sides.get(_THEIRS, {})
    return [
        {"figure": name}
        | {
            (side if own is theirs else f"ours, {side}"): f"{own[name]:.3g}"
            + (f" ({own[name] / theirs[name]:.2f}x)" if theirs and own is not theirs else "")
            for side, own in sides.items()
        }
        for name in sorted(next(iter(sides.values())))
    ]


def _run_ours(weights: str, model: str, *, dtype: str, threads: int) -> Figures:
    found: Figures = {}
    for clip_s in _CLIPS_S:
        command = (sys.executable, "-m", __name__, weights, model, dtype, str(threads), str(clip_s))
        text, memory_gb = _run(command, allocator_variables())
        found |= json.loads(text.splitlines()[-1]) | {"peak memory (GB)": memory_gb}
    return found


def _run_theirs(settings: CaseSettings, *, model: str) -> Figures:
    found: Figures = {}
    program = [str(settings.binary), "--model", model, "--models-dir", str(settings.weights), "--prompt", "a bell"]
    program += ["--threads", str(settings.threads), "--duration-padding", "0", "--seed", "1", "--steps", str(_STEPS)]
    for clip_s in _CLIPS_S:
        with tempfile.NamedTemporaryFile(suffix=".wav") as out:
            command = [*program, "--duration", str(clip_s), "--out", out.name]
            text, memory_gb = _run(command, {"SA3_PROFILE": "1"})
        ms = {name: float(value) for name, value in re.findall(r"\[sa3-profile\] (\w+) +([\d.]+) ms", text)}
        parts = ("conditioning", "dit_total", "dec_total", "write_wav")
        if missing := {"total", *parts} - ms.keys():
            raise ValueError(f"{settings.binary} printed no times of {', '.join(sorted(missing))}: {text[-500:]}")
        found |= _figures(clip_s, steps_ms=ms["dit_total"], decode_ms=ms["dec_total"])
        found |= {"load (s)": (ms["total"] - sum(ms[part] for part in parts)) / 1000, "peak memory (GB)": memory_gb}
    return found


def _figures(clip_s: int, *, steps_ms: float, decode_ms: float) -> Figures:
    return {f"step, {clip_s} s (s)": steps_ms / 1000 / _STEPS, f"decode, {clip_s} s (s)": decode_ms / 1000}


def _run(command: Sequence[str], variables: Mapping[str, str]) -> tuple[str, float]:
    """Run a program. Returns its output and its largest resident memory in GB. Raises ValueError if it fails."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env=os.environ | variables, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise ValueError(f"{command[0]} failed with status {process.returncode}: {text[-500:]}")
    return text, used.ru_maxrss * 1024 / 1e9


async def _measure_ours(weights: str, model: str, *, dtype: str, threads: int, clip_s: int) -> Figures:
    started_at = time.perf_counter()
    loaded = load_model(resolve_entry(model, path=weights), dtype=dtype, decode_precision=_PRECISIONS[dtype])
    load_s = time.perf_counter() - started_at
    request = GenerationRequest(prompt="a bell", duration_s=clip_s, duration_padding_s=0.0, steps=_STEPS, seed=1)
    async with Engine(loaded, EngineOptions(torch_threads=threads, warmup_budget_s=0.0)) as engine:
        used = (await engine.generate(request)).timings
    return {"load (s)": load_s, **_figures(clip_s, steps_ms=used.denoise_ms, decode_ms=used.decode_ms)}


if __name__ == "__main__":
    threads, clip_s = map(int, sys.argv[4:])
    print(json.dumps(asyncio.run(_measure_ours(*sys.argv[1:3], dtype=sys.argv[3], threads=threads, clip_s=clip_s))))
