"""`GET /v1/status` reports models, replicas and jobs, even if the job store or a replica does not respond."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from stable_audio_serve.core.catalog import ModelStatus
from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.core.operations import DrainReport, ModelReport, ReplicaReport, ServerReport
from tests.api.compat.serving import make_client
from tests.api.test_jobs import submit
from tests.backends import ToneBackend
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.server


class FixedOperations:
    """Admin operations that always return the same report."""

    def __init__(self, report: ServerReport) -> None:
        self.server_report = report
        self.num_reports = 0

    async def report(self) -> ServerReport:
        self.num_reports += 1
        return self.server_report

    async def keep(self, model: str) -> None: ...

    async def release(self, model: str) -> None: ...

    async def drain(self) -> None: ...

    async def resume(self) -> None: ...


async def poll_until(client: httpx.AsyncClient, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Read the status until its field `jobs` meets the condition. Returns the status."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition((status := (await client.get("/v1/status")).json())["jobs"]):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    return dict(status)


async def test_status_has_models_replicas_and_jobs() -> None:
    replicas = (
        ReplicaReport(
            "a1",
            0.4,
            "cuda:0",
            "bfloat16",
            "accelerated",
            memory_bytes={"weights": 3, "rows": 4},
            requests=3,
            backlog_s=1.5,
            rows_per_step=6.0,
            requests_per_minute=70,
        ),
        ReplicaReport(
            "b2",
            9.0,
            "cuda:1",
            "bfloat16",
            "plain: by choice",
            requests=1,
            backlog_s=0.5,
            rows_per_step=2.0,
            requests_per_minute=5,
        ),
        ReplicaReport("c3", 0.1),  # a replica with an older program may report nothing else
    )
    ready = ModelStatus("ready", 3, "cuda:0", states={"running": 3, "starting": 1})
    models = {"medium": ModelReport(ready, is_kept=True, replicas=replicas, waiting_jobs_s=7.5)}
    operations = FixedOperations(ServerReport(models, DrainReport("draining", 2, None), age_s=0.5))
    settings = {"models": [{"name": "medium", "replicas": {"max_replicas": 4}}, {"name": "small-sfx"}]}
    async with make_client(operations=operations, run_jobs=False, **settings) as (client, _):
        await submit(client)
        status = await poll_until(client, lambda jobs: jobs["queued"] is not None)
    assert status["draining"] == {"state": "draining", "requests": 2, "jobs": None}
    assert status["backlog_s"] == 2.0
    medium = status["models"]["medium"]
    assert medium["replicas"][0] == {
        "id": "a1",
        "device": "cuda:0",
        "dtype": "bfloat16",
        "profile": "accelerated",
        "memory_bytes": {"weights": 3, "rows": 4},
        "requests": 3,
        "backlog_s": 1.5,
        "rows_per_step": 6.0,
        "requests_per_minute": 70,
        "age_s": 0.4,
    }
    assert medium["replicas"][2] == dict.fromkeys(medium["replicas"][2]) | {"id": "c3", "age_s": 0.1}
    del medium["replicas"]
    assert medium == {
        "stage": "ready",
        "default": False,
        "kept": True,
        "min_replicas": 0,
        "max_replicas": 4,
        "states": {"running": 3, "starting": 1},
        "backlog_s": 2.0,
        "rows_per_step": 4.0,
        "waiting_jobs_s": 7.5,
        "requests_per_minute": 75,
    }
    assert status["models"]["small-sfx"]["min_replicas"] == 1  # the default model is preloaded
    jobs = status["jobs"]
    assert 0 <= jobs.pop("waited_s") < 60
    assert 0 <= jobs.pop("age_s") < 60
    assert jobs == {
        "store": {"state": "ok", "reason": None},
        "queued": 1,
        "running": 0,
        "succeeded": 0,
        "failed": 0,
        "cancelled": 0,
        "dead_letters": 0,
        "reason": None,
    }


async def test_status_gives_the_reason_if_models_are_unknown() -> None:
    reason = "Ray Serve's controller does not answer"
    operations = FixedOperations(ServerReport({}, age_s=float("inf"), reason=reason))
    async with make_client(operations=operations) as (client, _):
        status = (await client.get("/v1/status")).json()
    assert (status["age_s"], status["reason"], status["ready"], status["status"]) == (None, reason, False, "loading")
    assert {model["stage"] for model in status["models"].values()} == {"loading"}


async def test_status_gives_the_reason_if_jobs_are_unknown(tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    async with make_client(output_dir=str(folder), run_jobs=False, hasty=True) as (client, _):
        status = await poll_until(client, lambda jobs: jobs["queued"] is not None)
        assert status["jobs"]["queued"] == 0
        shutil.rmtree(folder)
        jobs = (await poll_until(client, lambda jobs: jobs["reason"] is not None))["jobs"]
    assert jobs["store"]["state"] == "moved"
    assert jobs["queued"] == 0  # counted before the folder was deleted
    assert jobs["age_s"] > 0


async def test_concurrent_status_requests_succeed_and_start_no_generation() -> None:
    backend = ToneBackend()
    async with make_client(backend, run_jobs=False) as (client, _):
        # Let the server count the jobs once. If it is too busy for a new count, it returns the last count.
        await poll_until(client, lambda jobs: jobs["queued"] is not None)
        replies = await asyncio.gather(*(client.get("/v1/status") for _ in range(200)))
        ages = [reply.json()["jobs"]["age_s"] for reply in replies]
    assert {reply.status_code for reply in replies} == {200}
    assert all(age is not None for age in ages)
    assert backend.requests == []


async def test_status_needs_a_key_of_any_scope() -> None:
    hashes = [hash_key("plain")]
    async with make_client(api={"key_hashes": hashes}) as (client, _):
        assert (await client.get("/v1/status")).status_code == 401
        reply = await client.get("/v1/status", headers={"Authorization": "Bearer plain"})
    assert reply.status_code == 200
