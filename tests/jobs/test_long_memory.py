"""The process of the server and the runner needs no more memory for a long piece than for a short one."""

from __future__ import annotations

import asyncio
import multiprocessing
import re
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import numpy as np
import pytest

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.catalog import ModelCard, ModelCatalog, ModelStatus
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, ProgressCallback
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.jobs.open import open_queue
from stable_audio_serve.jobs.runner.runner import JobRunner
from tests.sockets import listening

pytestmark = [pytest.mark.server, pytest.mark.slow]

MOST_GROWTH_MB = 20
NUM_BEFORE = 3  # one-minute pieces before the measurement, because the memory of a new process grows at first
BYTES_PER_S = 4 * 44100


def test_twenty_minutes_take_no_more_memory_than_one(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    server = spawn.Process(target=_main, args=(tmp_path, theirs), daemon=True)
    server.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{ours.recv()}", timeout=None) as http:
            for _ in range(NUM_BEFORE):
                _make(http, minutes=1)
            after_one_mb = _peak_mb(server.pid)
            _make(http, minutes=20)
            growth_mb = _peak_mb(server.pid) - after_one_mb
    finally:
        server.kill()
        server.join()
    print(f"20 minutes took {growth_mb:.1f} MB more than 1 minute, which took {after_one_mb:.0f} MB")
    assert growth_mb <= MOST_GROWTH_MB


def _make(http: httpx.Client, *, minutes: int) -> None:
    """Submit a long piece of `minutes` minutes, read its audio while it is made, then download the finished file."""
    body = {"prompt": "white noise", "sections": [{"duration": 20}] * (3 * minutes)}
    path = http.post("/jobs", json=body).raise_for_status().json()["status_url"]
    for query in ("?follow=1", ""):
        with http.stream("GET", f"{path}/audio{query}") as reply:
            num_bytes = sum(map(len, reply.iter_bytes()))
        assert num_bytes >= 60 * minutes * BYTES_PER_S
        if query:  # the file is assembled after the last section
            while http.get(path).json()["status"] == "running":
                time.sleep(0.1)


def _peak_mb(pid: int | None) -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def _main(folder: Path, pipe: Connection) -> None:
    asyncio.run(_serve(Settings(output_dir=str(folder)), pipe))


class NoiseBackend:
    """A backend that returns noise immediately. It checks that no request is longer than the model's longest clip."""

    catalog = ModelCatalog([ModelCard("demo", "stable-audio-3", max_duration_s=48.0)])

    async def generate(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
    ) -> GenerationResult:
        assert request.duration_s <= 48.0
        shape = (2, int(request.duration_s * 44100))
        noise = 0.1 * np.random.default_rng(request.seed).standard_normal(shape, dtype=np.float32)
        return GenerationResult((noise,), 44100, model, request.seeds)

    async def status(self) -> Mapping[str, ModelStatus]:
        return {}


async def _serve(settings: Settings, pipe: Connection) -> None:
    queue, backend = open_queue(settings), NoiseBackend()
    runner = JobRunner(queue.store, queue.artifacts, backend=backend, settings=settings)
    await runner.start()
    queue.wake = runner.wake
    async with listening(create_app(backend, settings, jobs=queue), lifespan="off") as port:
        pipe.send(port)
        await asyncio.Event().wait()
