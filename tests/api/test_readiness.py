"""`/ready` for load balancers and `/health` for supervisors, in each state of the default model."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI

from stable_audio_serve.api.middleware.draining import Draining
from stable_audio_serve.core.catalog import ModelStatus
from tests.api.prefixes import PREFIXES as DIALECTS
from tests.backends import ToneBackend

PREFIXES = ("", *DIALECTS)

# State of the default model, then the expected responses: the status of /ready, `status` and `healthy` of /health.
STAGES = [
    (None, 503, "loading", False),
    ("loading", 503, "loading", False),
    ("failed", 503, "failed", False),
    ("ready", 200, "ok", True),
    ("idle", 200, "ok", True),  # no replica: the first request starts one and waits
    ("waking", 200, "ok", True),  # requests wait until the model is loaded
]


@pytest.fixture
def draining(shared: tuple[FastAPI, ToneBackend]) -> Draining:
    return shared[0].state.draining


@pytest.mark.parametrize(("stage", "status", "word", "healthy"), STAGES)
@pytest.mark.parametrize("other", ["ready", "failed"])
async def test_default_model_decides_readiness(
    client: httpx.AsyncClient,
    backend: ToneBackend,
    stage: str | None,
    status: int,
    word: str,
    healthy: bool,
    other: str,
) -> None:
    backend.statuses = {"medium": ModelStatus(other)} | ({"small-sfx": ModelStatus(stage)} if stage else {})
    ready, health = await client.get("/ready"), await client.get("/health")
    assert (ready.status_code, health.status_code) == (status, 200)
    # Any loaded model makes the word ok, as in the original server.
    health_word = "ok" if other == "ready" else word
    assert (health.json()["status"], health.json()["healthy"]) == (health_word, healthy)
    vllm_word = (await client.get("/vllm/health")).json()["status"]
    assert vllm_word == ("healthy" if health_word == "ok" else word)
    assert (ready.json()["ready"], ready.json()["status"]) == (healthy, word)
    assert ready.json()["reasons"] == health.json()["reasons"]
    if healthy:
        assert ready.json()["reasons"] == []
    else:
        assert "small-sfx" in ready.json()["reasons"][0]
        assert int(ready.headers["retry-after"]) >= 1


@pytest.mark.parametrize("prefix", PREFIXES)
async def test_health_is_503_if_all_models_failed(client: httpx.AsyncClient, backend: ToneBackend, prefix: str) -> None:
    status, word = {"/sa3": (200, "failed"), "/saos": (500, "error"), "/vllm": (503, "unhealthy")}.get(
        prefix, (503, "failed")
    )
    names = [card.name for card in backend.catalog]
    backend.statuses = dict.fromkeys(names, ModelStatus("failed"))
    health, head = await client.get(f"{prefix}/health"), await client.head(f"{prefix}/health")
    assert (health.status_code, head.status_code) == (status, status)
    assert health.json()["status"] == word
    backend.statuses = {name: ModelStatus("idle" if name == "medium" else "failed") for name in names}
    expected = 500 if prefix == "/saos" else 200  # Open Small's own route is about its own model
    assert (await client.get(f"{prefix}/health")).status_code == expected


async def test_blocked_server_is_not_ready_and_gives_the_reason(client: httpx.AsyncClient, draining: Draining) -> None:
    draining.drain()
    try:
        ready, health = await client.get("/ready"), await client.get("/health")
    finally:
        draining.resume()
    assert (ready.status_code, ready.json()["reasons"]) == (
        503,
        ["an operator is draining this server; send new work to another server"],
    )
    assert (health.status_code, health.json()["status"], health.json()["healthy"]) == (200, "draining", False)
    assert (await client.get("/ready")).status_code == 200


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("status", [200, 503])
async def test_probes_work_on_all_prefixes_and_with_head(
    client: httpx.AsyncClient, backend: ToneBackend, prefix: str, status: int
) -> None:
    if status == 503:
        backend.statuses = {}
    reply, head = await client.get(f"{prefix}/ready"), await client.head(f"{prefix}/ready")
    assert (reply.status_code, head.status_code) == (status, status)
    assert head.headers["content-length"] == reply.headers["content-length"]
    assert head.content == b""


@pytest.mark.server
async def test_probes_respond_while_the_backend_hangs(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    """/health and /ready respond at once, however many requests wait for the backend."""
    body = {"prompt": "x", "duration": 1}
    paths = ("/health", "/ready")
    expected = [(200, (await client.get(path)).json()) for path in paths]
    backend.delay_s = 600
    busy = [asyncio.create_task(client.post("/v1/audio/generations", json=body)) for _ in range(270)]
    try:
        while backend.num_running < 256:  # `ingress.max_ongoing_requests`: as many as run at once
            await asyncio.wait(busy, timeout=0.05)
        async with asyncio.timeout(60):  # the backend responds after 600 s
            replies = await asyncio.gather(*(client.get(path) for path in paths))
    finally:
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
    assert [(reply.status_code, reply.json()) for reply in replies] == expected  # unchanged


async def test_health_has_the_device_of_the_default_model(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    backend.statuses = {"small-sfx": ModelStatus("ready", 1, "cuda:1"), "medium": ModelStatus("ready", 1, "cpu")}
    assert (await client.get("/health")).json()["device"] == "cuda:1"
    backend.statuses = {}
    assert (await client.get("/health")).json()["device"] is None  # null until the device is known
