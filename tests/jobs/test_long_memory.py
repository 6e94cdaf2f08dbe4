"""A long piece takes no more memory than a short one. The engine, the runner and the server share one process here."""

from __future__ import annotations

import asyncio
import multiprocessing
import re
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import pytest

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.catalog import ModelCatalog
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.jobs.open import open_queue
from stable_audio_serve.jobs.runner.runner import JobRunner
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.registry import describe_entry, resolve_entry
from stable_audio_serve.serving.local import LocalBackend
from tests.sockets import listening

pytestmark = [pytest.mark.server, pytest.mark.slow]

MOST_GROWTH_MB = 20
# The memory of an engine grows during its first requests, however long the pieces are: torch keeps what it has freed.
NUM_BEFORE = 12
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
    """Make a piece, follow its audio, and download it."""
    body = {"prompt": "white noise", "steps": 2, "sections": [{"duration": 20}] * (3 * minutes)}
    path = http.post("/jobs", json=body).raise_for_status().json()["status_url"]
    for query in ("?follow=1", ""):
        with http.stream("GET", f"{path}/audio{query}") as reply:
            num_bytes = sum(map(len, reply.iter_bytes()))
        assert num_bytes >= 60 * minutes * BYTES_PER_S
        if query:  # the file is assembled after the last section
            while http.get(path).json()["status"] == "running":
                pass


def _peak_mb(pid: int | None) -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def _main(folder: Path, pipe: Connection) -> None:
    asyncio.run(_serve(Settings(output_dir=str(folder)), pipe))


async def _serve(settings: Settings, pipe: Connection) -> None:
    entry = resolve_entry("demo")
    catalog = ModelCatalog([describe_entry(entry).card])
    queue = open_queue(settings, catalog=catalog)
    engine = Engine(load_model(entry), EngineOptions(torch_threads=1, warmup_budget_s=0.0))
    async with LocalBackend(catalog, {"demo": engine}) as backend:
        runner = JobRunner(queue.store, queue.artifacts, backend=backend, settings=settings)
        await runner.start()
        queue.wake = runner.wake
        async with listening(create_app(backend, settings, jobs=queue), lifespan="off") as port:
            pipe.send(port)
            await asyncio.Event().wait()
