"""Jobs over HTTP with each kind of job store, and each dialect's response while the store is unavailable."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from stable_audio_serve.artifacts.local import LocalArtifacts
from stable_audio_serve.core.errors import StorageFullError
from stable_audio_serve.core.keys import hash_key
from tests.api.compat.serving import make_client
from tests.api.test_job_events import ids, read
from tests.api.test_job_reading import read_pages
from tests.api.test_job_repeats import ID, PATHS, expect_conflict, post
from tests.api.test_jobs import BODY, submit, wait
from tests.audio_files import pcm_of
from tests.databases import postgres
from tests.jobs.stores import postgres_with_tables, store_url

pytestmark = pytest.mark.server

__all__ = ["postgres", "postgres_with_tables", "store_url"]

FAL = "/queue/fal-ai/stable-audio"
AIML = "/v2/generate/audio"
STABILITY = "/v2beta/audio/stable-audio/text-to-audio"


@pytest.mark.slow  # SQLite is tested in test_job_repeats.py
@pytest.mark.parametrize("path", ["/jobs", "/jobs/inpaint"])
async def test_fifty_concurrent_submissions_are_one_job(store_url: str, path: str) -> None:
    async with make_client(run_jobs=False, jobs={"database_url": store_url}) as (client, _):
        replies = await asyncio.gather(*(post(client, path, key="fifty") for _ in range(50)))
        assert {reply.status_code for reply in replies} == {202}
        assert {reply.json()["id"] for reply in replies} == set((await read_pages(client))[0])
        assert sum("idempotent-replayed" not in reply.headers for reply in replies) == 1
        expect_conflict(await post(client, path, key="fifty", seed=12), "idempotency_key_reused", "Idempotency-Key")


@pytest.mark.slow  # SQLite is tested in test_job_repeats.py
async def test_race_for_one_id_has_one_winner(store_url: str) -> None:
    async with make_client(run_jobs=False, jobs={"database_url": store_url}) as (client, _):
        bodies = [BODY | {"seed": number % 5} for number in range(30)]
        replies = await asyncio.gather(*(client.put(f"/jobs/{ID}00", json=body) for body in bodies))
        assert sorted(reply.status_code for reply in replies) == [202] * 6 + [409] * 24
        assert await read_pages(client) == [[f"{ID}00"]]


async def test_limit_holds_for_concurrent_submissions(store_url: str) -> None:
    limits = {"database_url": store_url, "max_queued": 9, "max_queued_per_key": 7}
    async with make_client(run_jobs=False, jobs=limits, api={"key_hashes": [hash_key("one")]}) as (client, _):
        client.headers["Authorization"] = "Bearer one"
        replies = await asyncio.gather(*(client.post("/jobs", json=BODY) for _ in range(20)))
        assert sorted(reply.status_code for reply in replies) == [202] * 7 + [429] * 13


async def test_pages_while_jobs_arrive(store_url: str) -> None:
    async with make_client(run_jobs=False, jobs={"database_url": store_url}) as (client, _):
        first = [(await submit(client))["id"] for _ in range(7)]

        async def keep_submitting() -> None:
            while True:
                await submit(client)

        arriving = asyncio.create_task(keep_submitting())
        pages = await read_pages(client, limit=2)
        arriving.cancel()
        listed = [job_id for page in pages for job_id in page]
        assert len(listed) == len(set(listed))
        assert [job_id for job_id in listed if job_id in first] == first[::-1]


async def test_job_from_submission_to_its_end(store_url: str) -> None:
    async with make_client(jobs={"database_url": store_url}) as (client, backend):
        ticket = await submit(client, "/jobs/variations", prompt="nul \x00 \U0001f3b5")
        status = await wait(client, ticket)
        assert status["status"] == "succeeded"
        assert backend.last.prompt == "nul \x00 \U0001f3b5"
        assert len(pcm_of((await client.get(status["download_url"])).content)) == 4 * int(1.5 * 44100)
        events = await read(client, ticket)
        assert events[-1]["data"] == status
        assert ids(await read(client, ticket, after=str(ids(events)[1]))) == ids(events)[2:]
        backend.delay_s = 30
        running = await submit(client)
        await wait(client, running, "running")
        assert (await client.delete(f"/jobs/{running['id']}")).status_code == 202
        assert (await wait(client, running))["status"] == "cancelled"


async def test_odd_ids_are_unknown(store_url: str) -> None:
    odd = ("%00", "%ED%A0%BC", "%F0%9F%8E%B5", "'%3B--", "a" * 3000, "%5C%5C", "9" * 40)
    async with make_client(run_jobs=False, jobs={"database_url": store_url}) as (client, _):
        for method, path in (
            ("GET", "/jobs/{}"),
            ("DELETE", "/jobs/{}"),
            ("GET", f"{AIML}?generation_id={{}}"),
            ("GET", f"{FAL}/requests/{{}}/status"),
            ("PUT", f"{FAL}/requests/{{}}/cancel"),
        ):
            for job_id in odd:
                reply = await client.request(method, path.format(job_id))
                assert reply.status_code == 404, (method, path, job_id, reply.text)


def submissions(client: httpx.AsyncClient) -> dict[str, Any]:
    """Returns functions that each send one request. Each request needs the job store.

    The keys name the dialect and the kind of request.
    """
    return {
        "native": lambda: client.post("/jobs", json=BODY),
        "native with a file": lambda: post(client, "/jobs/variations", key=None),
        "native with an id": lambda: client.put(f"/jobs/{ID}00", json=BODY),
        "native list": lambda: client.get("/jobs"),
        "native status": lambda: client.get(f"/jobs/{ID}00"),
        "native events": lambda: client.get(f"/jobs/{ID}00/events"),
        "native cancel": lambda: client.delete(f"/jobs/{ID}00"),
        "fal": lambda: client.post(FAL, json={"prompt": "x"}),
        "fal now": lambda: client.post("/fal-ai/stable-audio", json={"prompt": "x", "seconds_total": 1}),
        "fal status": lambda: client.get(f"{FAL}/requests/{ID}00/status"),
        "aiml": lambda: client.post(AIML, json={"model": "stable-audio", "prompt": "x"}),
        "stability": lambda: client.post(STABILITY, data={"prompt": "x"}),
        "stability status": lambda: client.get(f"/v2beta/audio/results/{ID}"),
        "aiml status": lambda: client.get(AIML, params={"generation_id": ID}),
    }


def expect_body(dialect: str, reply: httpx.Response) -> None:
    body = reply.json()
    assert "/" not in str(
        body.get("detail", body.get("message", body.get("errors")))
    )  # the message contains no file path
    if dialect == "stability":
        assert body.keys() == {"id", "name", "errors"}
    elif dialect == "aiml":
        assert (body["statusCode"], body.keys()) == (reply.status_code, {*body} | {"message", "error", "path", "meta"})
    elif dialect == "fal":
        assert body.keys() == {"detail", "error_type"}
        assert reply.headers["x-fal-error-type"] == body["error_type"]
        assert reply.headers["x-fal-retryable"] == ("true" if reply.status_code == 503 else "false")
    else:
        assert body.keys() == {"detail"}


async def test_unavailable_store_is_503_in_every_dialect(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    url = f"sqlite:///{tmp_path}/file/jobs.db"
    async with make_client(run_jobs=False, jobs={"database_url": url}) as (client, _):
        for name, ask in submissions(client).items():
            reply = await ask()
            assert reply.status_code == 503, (name, reply.text)
            assert int(reply.headers["retry-after"]) >= 1, name
            expect_body(name.split()[0], reply)


async def test_full_disk_is_507_in_every_dialect_with_files(monkeypatch: pytest.MonkeyPatch) -> None:
    async def put(*_: object, **__: object) -> None:
        raise StorageFullError("the disk is full")

    monkeypatch.setattr(LocalArtifacts, "put", put)
    async with make_client(run_jobs=False) as (client, _):
        for name in ("native with a file", "fal now"):
            reply = await submissions(client)[name]()
            assert reply.status_code == 507, (name, reply.text)
            assert reply.json()["detail"] == "the disk is full"
            assert "retry-after" not in reply.headers
            expect_body(name.split()[0], reply)


@pytest.mark.parametrize("path", PATHS)
async def test_retries_with_one_key_give_one_job_after_an_outage(tmp_path: Path, path: str) -> None:
    """A client that repeats a refused request until it is accepted has submitted only one job."""
    folder = tmp_path / "jobs"
    folder.write_text("in the way")
    async with make_client(run_jobs=False, jobs={"database_url": f"sqlite:///{folder}/jobs.db"}) as (client, _):
        assert (await post(client, path, key="patient")).status_code == 503
        folder.unlink()
        tickets = [(await post(client, path, key="patient")).json() for _ in range(2)]
        assert tickets[0] == tickets[1]
        assert await read_pages(client) == [[tickets[0]["id"]]]
