"""Measures the time from the server's start command to its first audio, and compares it with a lower bound.

The lower bound is the time in which Ray starts, plus the time in which a bare Python process, without a server, loads
the model and generates the same clip.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from benchmarks.figures import worst
from benchmarks.models import CaseSettings, resolve_model
from benchmarks.servers.process import running_server, write_config

# Program of the Python process without a server. Its run time is a lower bound for the start of every server.
_BARE = """
import asyncio, sys
from benchmarks.models import CaseSettings, load
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.engine import Engine, EngineOptions
model = load(CaseSettings(model=sys.argv[1] or None, device=sys.argv[2]))
request = GenerationRequest(prompt="a bell", duration_s=1.0, seed=1)
options = EngineOptions(torch_threads=int(sys.argv[3]), warmup_budget_s=0.0)
asyncio.run(Engine(model, options).generate(request))
"""


async def measure(settings: CaseSettings) -> dict[str, Any]:
    """In each of `settings.rounds` rounds, measure the time to the first audio of a bare process and of two servers."""
    entry = resolve_model(settings.model)
    rounds: list[dict[str, Any]] = []
    for _ in range(settings.rounds):
        bare_s = _start_bare(settings)
        with tempfile.TemporaryDirectory() as folder:
            config = write_config(Path(folder), entry, threads=settings.threads, device=settings.device)
            starts = [_start_once(config, model=entry.card.name) for _ in range(2)]
        rounds.append({"bare_s": bare_s, "starts": starts})
    slowest = max((start for r in rounds for start in r["starts"]), key=lambda start: start["first_audio_s"])
    # For each round: the slower start, divided by the time that no server can avoid (Ray's start + the bare process).
    ratios = [max(start["first_audio_s"] / (start["ray_s"] + r["bare_s"]) for start in r["starts"]) for r in rounds]
    return {
        "rounds": rounds,
        "first_audio_s": slowest["first_audio_s"],
        "ready_s": slowest["ready_s"],
        **worst("first_audio_over_ray_plus_bare_ratio", ratios),
    }


def _start_bare(settings: CaseSettings) -> float:
    started_at = time.perf_counter()
    arguments = (settings.model or "", settings.device, str(settings.threads))
    subprocess.run([sys.executable, "-c", _BARE, *arguments], check=True)
    return time.perf_counter() - started_at


def _start_once(config: Path, *, model: str) -> dict[str, Any]:
    with running_server(config) as server:
        asked_at = time.perf_counter()
        body = {"model": model, "prompt": "a bell", "duration": 1.0, "seed": 1}
        httpx.post(f"{server.url}/v1/audio/generations", json=body, timeout=120.0).raise_for_status()
        first_audio_s = server.ready_s + time.perf_counter() - asked_at
    return {"ready_s": server.ready_s, "first_audio_s": first_audio_s, "ray_s": server.ray_s}


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """Returns a table with one row, the slowest start of all rounds."""
    return [
        {
            "ready (s)": results["ready_s"],
            "first audio (s)": results["first_audio_s"],
            "over Ray and the bare load": results["first_audio_over_ray_plus_bare_ratio"],
        }
    ]
