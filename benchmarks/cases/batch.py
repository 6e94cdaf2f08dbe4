"""What a client who waits for an answer feels of another client's thirty batch jobs, and what those lose by it."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.cases.engine import resolve_model
from benchmarks.servers.process import running_server, write_config
from benchmarks.settings import CaseSettings

_KEYS = ("waits", "batch")
_TIMEOUT_S = 300.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Load:
    """The request that is waited for, and the jobs of another key that are there before it."""

    clip_s: float = 10.0
    steps: int = 370
    jobs: int = 30
    job_s: float = 10.0
    job_steps: int = 125


def run_batch_case(settings: CaseSettings, load: Load | None = None) -> dict[str, Any]:
    """The request alone and behind the jobs, the jobs alone and with the request among them; the worse round counts."""
    load = load or Load()
    entry = resolve_model(settings.model)
    api = {"key_hashes": [hashlib.sha256(key.encode()).hexdigest() for key in _KEYS], "max_steps": 1000}
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(Path(folder), entry, threads=settings.threads, api=api)
        with running_server(config) as server:
            waits, batch = (_client(server.url, key) for key in _KEYS)
            _generate(waits, load)
            rounds = [_round(waits, batch, load=load) for _ in range(settings.rounds)]
    return {
        "load": asdict(load),
        "target": {"behind_over_alone_ratio": 1.5, "batch_lost_over_taken_ratio": 1.0},
        "worst_behind_over_alone_ratio": max(run["behind_s"] / run["alone_s"] for run in rounds),
        "worst_batch_lost_over_taken_ratio": max(
            (run["jobs_beside_s"] - run["jobs_alone_s"]) / run["behind_s"] for run in rounds
        ),
        "rounds": rounds,
    }


def _client(url: str, key: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=_TIMEOUT_S)


def _round(waits: httpx.Client, batch: httpx.Client, *, load: Load) -> dict[str, float]:
    alone_s = median(_generate(waits, load) for _ in range(3))
    jobs_alone_s = -_submit(batch, load) + _wait_until_done(batch)
    started_at = _submit(batch, load)
    _wait_until_one_runs(batch)
    behind_s = _generate(waits, load)
    return {
        "alone_s": alone_s,
        "behind_s": behind_s,
        "jobs_alone_s": jobs_alone_s,
        "jobs_beside_s": _wait_until_done(batch) - started_at,
    }


def _generate(client: httpx.Client, load: Load) -> float:
    """Seconds that a synchronous request takes."""
    started_at = time.perf_counter()
    body = {"prompt": "a low drone", "duration": load.clip_s, "steps": load.steps, "seed": 1}
    client.post("/v1/audio/generations", json=body).raise_for_status()
    return time.perf_counter() - started_at


def _submit(client: httpx.Client, load: Load) -> float:
    """Hand in all jobs; when that began."""
    started_at = time.perf_counter()
    for seed in range(load.jobs):
        body = {"prompt": "rain", "duration": load.job_s, "steps": load.job_steps, "seed": seed, "priority": "batch"}
        client.post("/jobs", json=body).raise_for_status()
    return started_at


def _wait_until_one_runs(client: httpx.Client) -> None:
    while not client.get("/jobs", params={"status": "running", "limit": 1}).raise_for_status().json()["jobs"]:
        time.sleep(_POLL_S)


def _wait_until_done(client: httpx.Client) -> float:
    """When no job is left that waits or runs."""
    for status in ("queued", "running", "queued", "running"):  # one may go from running back to waiting
        while client.get("/jobs", params={"status": status, "limit": 1}).raise_for_status().json()["jobs"]:
            time.sleep(_POLL_S)
    return time.perf_counter()


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """What somebody who waits feels of another client's batch jobs, and what those lose by it."""
    return [
        {
            "alone_s": run["alone_s"],
            "behind_s": run["behind_s"],
            "ratio": run["behind_s"] / run["alone_s"],
            "jobs_alone_s": run["jobs_alone_s"],
            "jobs_beside_s": run["jobs_beside_s"],
        }
        for run in results["rounds"]
    ]
