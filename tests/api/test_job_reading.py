"""Reading and cancelling jobs: ownership, order, and the response in each state."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import standardwebhooks

from stable_audio_serve.core.errors import GenerationError
from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.jobs.queue import JobQueue
from stable_audio_serve.jobs.runner.runner import JobRunner
from stable_audio_serve.jobs.store.tables import JOBS
from tests.api.compat.serving import make_client
from tests.api.test_jobs import BODY, KEYS, submit, wait
from tests.backends import ToneBackend
from tests.patience import until
from tests.webhook_receiver import receiving


@pytest.fixture
def alone(client: httpx.AsyncClient, jobs: JobQueue) -> httpx.AsyncClient:
    """Delete all jobs of the shared application. Returns a client of the application."""
    with jobs.store.database.writing() as connection:
        connection.execute(JOBS.delete())
    return client


async def read_pages(client: httpx.AsyncClient, **query: Any) -> list[list[str]]:
    """Read the list of jobs page by page. Returns the job ids of each page."""
    pages: list[list[str]] = []
    while True:
        reply = await client.get("/jobs", params=query)
        assert reply.status_code == 200, reply.text
        page = reply.json()
        assert page.keys() == {"jobs", "next_cursor"}
        assert all(set(job) == KEYS for job in page["jobs"])
        pages.append([job["id"] for job in page["jobs"]])
        if page["next_cursor"] is None:
            return pages
        query["cursor"] = page["next_cursor"]


async def test_list_is_newest_first_in_pages(alone: httpx.AsyncClient) -> None:
    assert await read_pages(alone) == [[]]
    ids = [(await submit(alone))["id"] for _ in range(5)]
    newest = ids[::-1]
    assert await read_pages(alone) == [newest]
    assert await read_pages(alone, limit=2) == [newest[:2], newest[2:4], newest[4:]]
    assert await read_pages(alone, limit=5) == [newest]
    page = (await alone.get("/jobs")).json()["jobs"]
    assert page[0]["status"] == "queued"


async def test_pages_do_not_shift_while_jobs_arrive(alone: httpx.AsyncClient) -> None:
    ids = [(await submit(alone))["id"] for _ in range(6)]
    first = (await alone.get("/jobs", params={"limit": 3})).json()
    for _ in range(4):
        await submit(alone)
    rest = (await alone.get("/jobs", params={"limit": 3, "cursor": first["next_cursor"]})).json()
    assert [job["id"] for job in first["jobs"] + rest["jobs"]] == ids[::-1]


async def test_list_of_one_status(alone: httpx.AsyncClient) -> None:
    kept, gone = [(await submit(alone))["id"] for _ in range(2)]
    await alone.delete(f"/jobs/{gone}")
    assert await read_pages(alone, status="cancelled") == [[gone]]
    assert await read_pages(alone, status="queued") == [[kept]]
    assert await read_pages(alone, status="succeeded") == [[]]


@pytest.mark.parametrize(
    ("query", "named"),
    [
        *(({"limit": limit}, "limit") for limit in ("0", "101", "-1", "x", "1.5", "")),
        *(({"cursor": cursor}, "cursor") for cursor in ("x", "", "-1", "1", "9" * 19, "\u0661", "1'--", "0" * 32)),
        *(({"status": status}, "status") for status in ("done", "", "QUEUED")),
    ],
)
async def test_invalid_list_parameter_is_named(client: httpx.AsyncClient, query: dict[str, str], named: str) -> None:
    reply = await client.get("/jobs", params=query)
    assert reply.status_code == 422
    assert [item["loc"] for item in reply.json()["detail"]] == [["query", named]]


async def test_list_has_only_jobs_of_the_key_and_dialect() -> None:
    async with make_client(run_jobs=False, api={"key_hashes": [hash_key("one"), hash_key("two")]}) as (client, _):
        ids: dict[str, str] = {}
        for name in ("one", "two"):
            client.headers["Authorization"] = f"Bearer {name}"
            ids[name] = (await submit(client))["id"]
            await client.post("/queue/fal-ai/stable-audio", json={"prompt": "x"})
            await client.post("/v2/generate/audio", json={"model": "stable-audio", "prompt": "x"})
            assert await read_pages(client) == [[ids[name]]]
        foreign = await client.get("/jobs", params={"cursor": ids["one"]})
        unknown = await client.get("/jobs", params={"cursor": "0" * 32})
        assert foreign.status_code == unknown.status_code == 422
        assert foreign.text.replace(ids["one"], "") == unknown.text.replace("0" * 32, "")
        del client.headers["Authorization"]
        assert (await client.get("/jobs")).status_code == 401


async def test_queued_jobs_per_key_are_limited_over_all_dialects() -> None:
    keys = {"key_hashes": [hash_key("one"), hash_key("two")]}
    async with make_client(run_jobs=False, api=keys, jobs={"max_queued_per_key": 1}) as (client, _):
        client.headers["Authorization"] = "Bearer one"
        await submit(client)
        replies = [
            await client.post("/jobs", json=BODY),
            await client.put(f"/jobs/{'a' * 32}", json=BODY),
            await client.post("/queue/fal-ai/stable-audio", json={"prompt": "x"}),
            await client.post("/v2/generate/audio", json={"model": "stable-audio", "prompt": "x"}),
        ]
        for reply in replies:
            assert reply.status_code == 429, reply.text
            assert int(reply.headers["retry-after"]) >= 1
        client.headers["Authorization"] = "Bearer two"
        await submit(client)


async def test_status_has_the_queue_position(alone: httpx.AsyncClient) -> None:
    batch = await submit(alone, priority="batch")
    tickets = [await submit(alone) for _ in range(2)]
    for ticket, position, priority in (
        (tickets[0], 0, "interactive"),
        (tickets[1], 1, "interactive"),
        (batch, 0, "batch"),
    ):
        status = (await alone.get(ticket["status_url"])).json()
        assert status["priority"] == priority
        assert status["attempts"] == 0
        assert status["progress"] == {
            "stage": "queued",
            "fraction": 0.0,
            "eta_seconds": None,
            "queue_position": position,
        }


async def test_status_has_progress_and_attempts(
    client: httpx.AsyncClient, backend: ToneBackend, runner: JobRunner
) -> None:
    backend.released.clear()
    ticket = await submit(client)
    status = await wait(client, ticket, "running")
    backend.released.set()
    assert status["attempts"] == 1
    assert status["progress"]["queue_position"] is None
    done = await wait(client, ticket)
    assert (done["progress"]["stage"], done["progress"]["fraction"]) == ("done", 1.0)


async def test_queued_job_is_cancelled_immediately(alone: httpx.AsyncClient) -> None:
    ticket = await submit(alone)
    reply = await alone.delete(f"/jobs/{ticket['id']}")
    assert reply.status_code == 200
    status = reply.json()
    assert status == (await alone.get(ticket["status_url"])).json()
    assert (status["status"], status["error"]) == ("cancelled", "the job was cancelled")
    assert status["completed_at"] is not None
    again = await alone.delete(f"/jobs/{ticket['id']}")
    assert (again.status_code, again.json()["code"]) == (409, "job_is_over")
    assert (await alone.get(f"/jobs/{ticket['id']}/audio")).status_code == 409


async def test_running_job_is_cancelled(client: httpx.AsyncClient, backend: ToneBackend, runner: JobRunner) -> None:
    backend.delay_s = 30
    ticket = await submit(client)
    await wait(client, ticket, "running")
    await until(lambda: backend.num_running == 1)
    reply = await client.delete(f"/jobs/{ticket['id']}")
    assert (reply.status_code, reply.json()["status"]) == (202, "running")
    assert (await wait(client, ticket))["status"] == "cancelled"
    assert backend.num_cancelled == 1


async def test_ended_job_cannot_be_cancelled(client: httpx.AsyncClient, runner: JobRunner) -> None:
    ticket = await submit(client)
    before = await wait(client, ticket)
    reply = await client.delete(f"/jobs/{ticket['id']}")
    assert reply.status_code == 409
    assert reply.json() == {"detail": "the job has already ended: it is succeeded", "code": "job_is_over"}
    assert (await client.get(ticket["status_url"])).json() == before


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize(
    "job_id", ["0" * 32, "nope", "A" * 32, "..%2f..%2fetc%2fpasswd", "%00", "a" * 3000, "%F0%9F%8E%B5", "0" * 33]
)
async def test_unknown_id_is_404(client: httpx.AsyncClient, method: str, job_id: str) -> None:
    reply = await client.request(method, f"/jobs/{job_id}")
    assert reply.status_code == 404
    assert isinstance(reply.json()["detail"], str)


async def test_job_of_another_dialect_cannot_be_cancelled(client: httpx.AsyncClient) -> None:
    ticket = (await client.post("/queue/fal-ai/stable-audio", json={"prompt": "x"})).json()
    assert (await client.delete(f"/jobs/{ticket['request_id']}")).status_code == 404


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled"])
async def test_webhook_is_called_at_the_end(end: str) -> None:
    backend = ToneBackend(error=GenerationError("silence") if end == "failed" else None)
    jobs = {
        "webhook_allow_hosts": ["127.0.0.1"],
        "webhook_secret": "whsec_dGhlIHNlY3JldCBvZiB0aGlzIG9wZXJhdG9yLCBrZXB0IHdlbGw=",
    }
    async with receiving() as receiver, make_client(backend, jobs=jobs) as (client, _):
        backend.delay_s = 30 if end == "cancelled" else 0
        ticket = await submit(client, webhook_url=receiver.url)
        if end == "cancelled":
            await client.delete(f"/jobs/{ticket['id']}")
        await until(lambda: bool(receiver.requests))
        status = (await client.get(ticket["status_url"])).json()
    _, headers, content = receiver.requests[0]
    body = json.loads(content)
    assert headers["webhook-id"] == ticket["id"]
    assert standardwebhooks.Webhook(jobs["webhook_secret"]).verify(content, headers) == body
    assert body == {"type": f"job.{end}", "timestamp": status["completed_at"], "data": status}
    assert status["status"] == end
