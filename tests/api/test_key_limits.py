"""Limits of API keys, over HTTP, in every dialect, with two servers that share a database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.jobs.store.database import Database
from tests.backends import ToneBackend
from tests.jobs.stores import postgres_with_tables, store_url
from tests.patience import until

pytestmark = pytest.mark.server

__all__ = ["postgres_with_tables", "store_url"]

Pair = tuple[httpx.AsyncClient, httpx.AsyncClient]

KEYS = f"""
alice:{hash_key("alice")} audio-seconds-per-minute=60
alice:{hash_key("alice-2")} audio-seconds-per-minute=60
bob:{hash_key("bob")} concurrency=1
carol:{hash_key("carol")}
"""

# For each dialect, a synchronous request and a job: path, body and the seconds of audio that the limit counts.
REQUESTS: dict[str, tuple[str, dict[str, Any], float]] = {
    "sa3": ("/v1/audio/generations", {"prompt": "x", "duration": 2, "batch_size": 2}, 4),
    "merged": ("/generate", {"prompt": "x", "duration": 3}, 3),
    "vllm": ("/v1/audio/generate", {"input": "x", "audio_length": 2}, 2),
    "fal": ("/run/fal-ai/stable-audio", {"prompt": "x", "seconds_total": 5}, 5),
    "sa3 job": ("/jobs", {"prompt": "x", "duration": 6}, 6),
    "aiml job": ("/v2/generate/audio", {"model": "stable-audio", "prompt": "x", "seconds_total": 7}, 7),
    "fal job": ("/queue/fal-ai/stable-audio", {"prompt": "x", "seconds_total": 8}, 8),
    "stability": ("/v2beta/audio/stable-audio-2/text-to-audio", {"prompt": "x", "duration": 2}, 2),
    "elevenlabs": ("/v1/sound-generation", {"text": "x", "duration_seconds": 4}, 4),
    "stability job": ("/v2beta/audio/stable-audio/text-to-audio", {"prompt": "x", "duration": 3}, 3),
}


@pytest.fixture
def tones() -> ToneBackend:
    return ToneBackend()


@pytest.fixture
async def pair(store_url: str, tones: ToneBackend, tmp_path: Path) -> AsyncIterator[Pair]:
    """Yield clients of two servers that share a database."""
    (tmp_path / "keys").write_text(KEYS)
    tree = {
        "api": {"key_file": str(tmp_path / "keys")},
        "jobs": {"database_url": store_url},
        "output_dir": str(tmp_path / "outputs"),
    }
    async with AsyncExitStack() as stack:
        clients = []
        for _ in range(2):
            app = create_app(tones, Settings.model_validate(tree))
            await stack.enter_async_context(app.router.lifespan_context(app))
            transport = httpx.ASGITransport(app)
            client = httpx.AsyncClient(transport=transport, base_url="http://localhost")
            clients.append(await stack.enter_async_context(client))
        yield clients[0], clients[1]


async def ask(client: httpx.AsyncClient, kind: str, key: str = "alice") -> httpx.Response:
    path, body, _ = REQUESTS[kind]
    sent: dict[str, Any] = {"data" if kind.startswith("stability") else "json": body}
    return await client.post(path, **sent, headers={"Authorization": f"Key {key}"})


async def test_limit_of_a_client_holds_over_two_servers_and_two_keys(pair: Pair) -> None:
    began_at = asyncio.get_running_loop().time()
    kinds = [*REQUESTS] * 6
    replies = await asyncio.gather(
        *(ask(pair[n % 2], kind, ("alice", "alice-2")[n % 3 % 2]) for n, kind in enumerate(kinds))
    )
    assert {reply.status_code for reply in replies} <= {200, 202, 429}
    admitted_s = sum(REQUESTS[kind][2] for kind, reply in zip(kinds, replies, strict=True) if reply.is_success)
    assert asyncio.get_running_loop().time() - began_at > 59 or 54 <= admitted_s <= 60
    others = await asyncio.gather(*(ask(client, "sa3", "carol") for client in pair * 5))
    assert {reply.status_code for reply in others} == {200}


async def test_each_dialect_refuses_in_its_own_form(pair: Pair) -> None:
    body = {"prompt": "x", "duration": 30, "batch_size": 2}
    assert (await pair[0].post("/jobs", json=body, headers={"Authorization": "Key alice"})).status_code == 202
    for kind in REQUESTS:
        check_refusal(kind, await ask(pair[1], kind))


def check_refusal(kind: str, reply: httpx.Response) -> None:
    assert reply.status_code == 429
    assert 30 <= int(reply.headers["retry-after"]) <= 61
    body = reply.json()
    sentence = {
        "sa3": lambda: body["detail"],
        "sa3 job": lambda: body["detail"],
        "merged": lambda: body["error"],
        "vllm": lambda: body["error"]["message"],
        "fal": lambda: body["detail"],
        "fal job": lambda: body["detail"],
        "aiml job": lambda: body["message"],
        "stability": lambda: body["errors"][0],
        "elevenlabs": lambda: body["detail"]["message"],
        "stability job": lambda: body["errors"][0],
    }[kind]()
    assert "audio-seconds-per-minute=60" in sentence
    if kind == "vllm":
        assert body["error"]["type"] == "RateLimitError"
    if kind.startswith("fal"):
        assert (body["error_type"], reply.headers["x-fal-retryable"]) == ("quota", "true")


async def test_open_small_requests_are_charged(pair: Pair) -> None:
    headers = {"Authorization": "Bearer alice"}
    replies = [
        await pair[n % 2].post("/saos/generate", json={"prompt": "x", "seconds_total": 2}, headers=headers)
        for n in range(40)
    ]
    num_admitted = [reply.status_code for reply in replies].count(200)
    # The limit of 60 s admits 5 requests if each counts as the model's window of 11.9 s, or 30 if each counts as 2 s.
    assert num_admitted in (5, 30)
    assert {reply.status_code for reply in replies[num_admitted:]} == {429}
    assert "audio-seconds-per-minute" in replies[-1].json()["error"]


async def test_request_above_the_whole_limit_is_forbidden(pair: Pair) -> None:
    body = {"prompt": "x", "duration": 30, "batch_size": 4}
    for path in ("/v1/audio/generations", "/jobs"):
        reply = await pair[0].post(path, json=body, headers={"Authorization": "Bearer alice"})
        assert reply.status_code == 403
        assert "audio-seconds-per-minute=60" in reply.json()["detail"]


async def test_concurrency_limits_requests_on_all_servers_but_not_jobs(pair: Pair, tones: ToneBackend) -> None:
    tones.released.clear()
    first = asyncio.create_task(ask(pair[0], "sa3", "bob"))
    await until(lambda: tones.num_running == 1)
    refused = await ask(pair[1], "vllm", "bob")
    assert refused.status_code == 429
    assert "concurrency=1" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1
    assert (await ask(pair[1], "sa3 job", "bob")).status_code == 202
    tones.released.set()
    assert (await first).status_code == 200
    assert (await ask(pair[1], "vllm", "bob")).status_code == 200


async def test_a_repeated_job_is_charged_once(pair: Pair) -> None:
    headers = {"Authorization": "Bearer alice", "Idempotency-Key": "one"}
    for n in range(20):  # 20 requests for 6 s exceed the limit of 60 s
        reply = await pair[n % 2].post("/jobs", json=REQUESTS["sa3 job"][1], headers=headers)
        assert (reply.status_code, "idempotent-replayed" in reply.headers) == (202, n > 0)


async def test_job_of_a_repeated_request_is_returned_at_the_limit(pair: Pair) -> None:
    body = {"prompt": "x", "duration": 30}
    headers = [{"Authorization": "Bearer alice", "Idempotency-Key": name} for name in ("one", "two", "three")]
    first, second, third = [await pair[0].post("/jobs", json=body, headers=each) for each in headers]
    assert (first.status_code, second.status_code, third.status_code) == (202, 202, 429)
    again = await pair[1].post("/jobs", json=body, headers=headers[0])
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
    assert "idempotent-replayed" in again.headers
    other = await pair[1].post("/jobs", json={**body, "duration": 31}, headers=headers[0])
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_key_reused")


async def test_synchronous_requests_work_without_the_database(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Database) -> None:
        raise OSError("away")

    monkeypatch.setattr(Database, "_make_ready", fail)
    statuses = [(await ask(pair[0], "sa3")).status_code for _ in range(20)]
    assert statuses == [200] * 15 + [429] * 5  # without the database, each process applies the limit of 60 s alone
