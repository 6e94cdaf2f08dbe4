"""A job's server-sent events. The tests parse them strictly as the HTML standard specifies."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from stable_audio_serve.api.streams import StreamLimits
from stable_audio_serve.core.errors import GenerationError
from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.jobs.job import Job
from stable_audio_serve.jobs.queue import JobQueue
from tests.api.compat.serving import make_client, serve_app
from tests.api.test_jobs import submit, wait
from tests.backends import ToneBackend
from tests.databases import PostgresServer, postgres, postgres_url
from tests.patience import PATIENCE_S, until
from tests.recorded_metrics import RecordedMetrics

pytestmark = pytest.mark.server

__all__ = ["postgres", "postgres_url"]

FAST = StreamLimits(first_poll_s=0.02, last_poll_s=0.05, comment_s=0.2)
PROGRESS = {"stage", "fraction", "eta_seconds", "queue_position", "message", "at"}


def parse(text: str) -> list[dict[str, Any]]:
    """Parse the text of a complete event stream. Returns for each event its `event`, `id` (or None) and `data`."""
    assert text.endswith("\n\n")
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if fields:
            events.append({"event": fields["event"], "id": fields.get("id"), "data": json.loads(fields["data"])})
    return events


async def wait_for_polls(reads: list[str]) -> None:
    """Wait until the open event stream has polled its job several times.

    No other request may read jobs in that time.
    """
    enough = len(reads) + 5
    await until(lambda: len(reads) >= enough)


async def read(client: httpx.AsyncClient, ticket: dict[str, Any], *, after: str | None = None) -> list[dict[str, Any]]:
    """Read a job's event stream to its end. Returns the events, or only those after the event with the id `after`."""
    headers = {} if after is None else {"Last-Event-ID": after}
    reply = await client.get(f"/jobs/{ticket['id']}/events", headers=headers, timeout=PATIENCE_S)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-store"
    events = parse(reply.text)
    assert [event["event"] for event in events].count("end") == 1
    assert (events[-1]["event"], events[-1]["id"]) == ("end", "end")
    for event in events[:-1]:
        assert event["event"] == "progress"
        assert set(event["data"]) == PROGRESS
        assert (event["id"] is None) == (event["data"]["at"] is None)
    return events


def ids(events: list[dict[str, Any]]) -> list[int]:
    return [int(event["id"]) for event in events[:-1] if event["id"] is not None]


async def test_stream_reports_all_events_in_order(reads: list[str]) -> None:
    async with make_client(jobs={"max_running": 1}, stream_limits=FAST) as (client, backend):
        backend.released.clear()
        first, second = await submit(client), await submit(client)
        await wait(client, first, "running")
        following = asyncio.create_task(read(client, second))
        await wait_for_polls(reads)
        backend.released.set()
        events = await following
        assert events[-1]["data"] == (await client.get(second["status_url"])).json()
        assert events[-1]["data"]["status"] == "succeeded"
        event_ids = ids(events)
        assert event_ids == sorted(set(event_ids))
        stages = [event["data"]["stage"] for event in events[:-1]]
        assert (stages[0], stages[-1]) == ("queued", "done")
        fractions = [event["data"]["fraction"] for event in events[:-1]]
        assert fractions == sorted(fractions)
        assert any(event["data"]["queue_position"] == 0 for event in events)
        messages = [event["data"]["message"] for event in events[:-1] if event["data"]["message"]]
        assert messages[:2] == ["queued", "started"]
        assert messages[-1].startswith("finished")
        assert ids(await read(client, second)) == event_ids  # a later reader gets the same events
        assert (await read(client, first))[-1]["data"]["status"] == "succeeded"


async def test_stream_of_a_job_that_ends_during_a_poll_does_not_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    position = JobQueue.position
    async with make_client(jobs={"max_running": 1}, stream_limits=FAST) as (client, backend):

        async def position_before_the_end(jobs: JobQueue, job: Job) -> int:
            found = await position(jobs, job)
            backend.released.set()
            await until(lambda: (now := jobs.store.clients.get(job.spec.ref)) is not None and now.is_over)
            return found

        backend.released.clear()
        await submit(client)
        ticket = await submit(client)
        monkeypatch.setattr(JobQueue, "position", position_before_the_end)
        events = await read(client, ticket)
    stages = [event["data"]["stage"] for event in events[:-1]]
    assert (stages[0], stages[-1]) == ("queued", "done")
    assert events[-1]["data"]["status"] == "succeeded"


async def test_reconnected_stream_resumes_after_the_last_event() -> None:
    async with make_client(stream_limits=FAST) as (client, _):
        ticket = await submit(client)
        await wait(client, ticket)
        everything = await read(client, ticket)
        event_ids = ids(everything)
        assert len(event_ids) >= 3
        for number, last in enumerate(event_ids):
            rest = await read(client, ticket, after=str(last))
            assert ids(rest) == event_ids[number + 1 :]
            assert rest[-1] == everything[-1]
        assert ids(await read(client, ticket, after="0")) == event_ids


async def test_ended_stream_does_not_restart() -> None:
    async with make_client(stream_limits=FAST) as (client, _):
        ticket = await submit(client)
        await read(client, ticket)
        reply = await client.get(f"/jobs/{ticket['id']}/events", headers={"Last-Event-ID": "end"})
    assert (reply.status_code, reply.content) == (204, b"")


@pytest.mark.parametrize("last", ["", "x", "-1", "1.5", "9" * 19, "End", "1 2"])
async def test_invalid_event_id_is_named(client: httpx.AsyncClient, last: str) -> None:
    ticket = await submit(client)
    reply = await client.get(f"/jobs/{ticket['id']}/events", headers={"Last-Event-ID": last})
    assert reply.status_code == 422
    assert [item["loc"] for item in reply.json()["detail"]] == [["header", "Last-Event-ID"]]


@pytest.mark.parametrize("job_id", ["0" * 32, "nope", "A" * 32, "%00"])
async def test_unknown_job_has_no_events(client: httpx.AsyncClient, job_id: str) -> None:
    reply = await client.get(f"/jobs/{job_id}/events")
    assert (reply.status_code, reply.headers["content-type"]) == (404, "application/json")


@pytest.mark.parametrize("state", ["failed", "cancelled"])
async def test_stream_ends_with_the_job(state: str) -> None:
    backend = ToneBackend(delay_s=30 if state == "cancelled" else 0, error=GenerationError("silence"))
    async with make_client(backend, stream_limits=FAST) as (client, _):
        ticket = await submit(client)
        following = asyncio.create_task(read(client, ticket))
        if state == "cancelled":
            await wait(client, ticket, "running")
            await client.delete(f"/jobs/{ticket['id']}")
        events = await following
    assert events[-1]["data"]["status"] == state
    assert events[-1]["data"]["error"]


async def test_queue_position_changes_are_reported(reads: list[str]) -> None:
    async with make_client(run_jobs=False, stream_limits=FAST) as (client, _):
        before, ticket = await submit(client), await submit(client)
        following = asyncio.create_task(read(client, ticket))
        await wait_for_polls(reads)
        await client.delete(f"/jobs/{before['id']}")
        await wait_for_polls(reads)
        await client.delete(f"/jobs/{ticket['id']}")
        events = await following
    positions = [event["data"]["queue_position"] for event in events if event["id"] is None]
    assert positions == [1, 0]


@asynccontextmanager
async def open_stream(client: httpx.AsyncClient, ticket: dict[str, Any]) -> AsyncIterator[AsyncIterator[str]]:
    async with client.stream("GET", f"/jobs/{ticket['id']}/events", timeout=PATIENCE_S) as reply:
        assert reply.status_code == 200
        yield reply.aiter_lines()


async def test_closing_a_stream_frees_its_slot() -> None:
    metrics, limits = RecordedMetrics(), replace(FAST, max_open=2)
    async with (
        serve_app(ToneBackend(delay_s=30), stream_limits=limits, metrics=metrics) as (port, _),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client,
    ):
        ticket = await submit(client)
        fal = (await client.post("/queue/fal-ai/stable-audio", json={"prompt": "x"})).json()
        async with open_stream(client, ticket) as lines, asyncio.timeout(PATIENCE_S):
            for start in ("id: ", ":"):  # an idle stream sends comments
                async for line in lines:
                    if line.startswith(start):
                        break
            async with open_stream(client, ticket) as others:
                await anext(others)
                assert metrics.gauges["event_streams_open"] == 2
                for url in (f"/jobs/{ticket['id']}/events", f"{fal['status_url']}/stream"):
                    reply = await client.get(url)
                    assert reply.status_code in (429, 503), reply.text
                    assert "too many streams" in reply.json()["detail"]
                    assert int(reply.headers["retry-after"]) > 0
                    assert reply.headers["content-type"] == "application/json"

        statuses = []
        async with asyncio.timeout(PATIENCE_S):
            while 200 not in statuses:
                async with client.stream("GET", f"/jobs/{ticket['id']}/events") as reply:
                    statuses.append(reply.status_code)
        await until(lambda: metrics.gauges["event_streams_open"] == 0)


async def test_streams_per_client_are_limited() -> None:
    keys = {name: {"Authorization": f"Bearer {name}"} for name in ("greedy", "other")}
    api = {"key_hashes": [f"{name}:{hash_key(name)}" for name in keys]}
    async with (
        serve_app(ToneBackend(delay_s=30), api=api) as (port, _),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client,
        AsyncExitStack() as stack,
    ):
        client.headers.update(keys["greedy"])
        ticket = await submit(client)
        fal = (await client.post("/queue/fal-ai/stable-audio", json={"prompt": "x"})).json()
        streams = [await stack.enter_async_context(open_stream(client, ticket)) for _ in range(16)]
        assert [(await anext(lines))[:4] for lines in streams] == ["id: "] * 16
        for url in (f"/jobs/{ticket['id']}/events", f"{fal['status_url']}/stream"):
            reply = await client.get(url)
            assert reply.status_code == 429, reply.text
            assert "this client has" in reply.json()["detail"]
            assert int(reply.headers["retry-after"]) > 0
        client.headers.update(keys["other"])
        await anext(await stack.enter_async_context(open_stream(client, await submit(client))))


async def test_disconnected_stream_stops_polling(reads: list[str]) -> None:
    async with (
        serve_app(ToneBackend(delay_s=30), stream_limits=FAST) as (port, _),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client,
    ):
        ticket = await submit(client)
        async with open_stream(client, ticket) as lines:
            await anext(lines)
            await wait_for_polls(reads)
        async with asyncio.timeout(PATIENCE_S):
            seen = -1
            while seen != len(reads):
                seen = len(reads)
                await asyncio.sleep(0.3)  # much longer than the pause between two polls


async def test_stream_needs_a_key_if_keys_are_configured() -> None:
    async with make_client(run_jobs=False, api={"key_hashes": [hash_key("one")]}) as (client, _):
        reply = await client.get(f"/jobs/{'0' * 32}/events")
    assert reply.status_code == 401


@pytest.mark.server
async def test_stream_survives_a_database_restart(
    postgres: PostgresServer, postgres_url: str, reads: list[str]
) -> None:
    # Keep the stream open while the store restarts.
    pauses = StreamLimits(first_poll_s=0.05, last_poll_s=0.2, max_away_s=PATIENCE_S)
    async with make_client(run_jobs=False, jobs={"database_url": postgres_url}, stream_limits=pauses) as (client, _):
        ticket = await submit(client)
        following = asyncio.create_task(read(client, ticket))
        await wait_for_polls(reads)
        await asyncio.to_thread(postgres.stop, "immediate")
        await wait_for_polls(reads)
        assert not following.done()
        assert (await client.get(f"/jobs/{ticket['id']}/events")).status_code == 503
        await asyncio.to_thread(postgres.start)
        assert (await client.delete(f"/jobs/{ticket['id']}")).status_code == 200
        events = await following
    assert events[-1]["data"]["status"] == "cancelled"
    assert [event["data"]["message"] for event in events[:-1] if event["id"]] == ["queued", "cancelled"]


async def test_stream_ends_if_the_store_stays_unavailable(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time until then is the same if each query takes long to fail."""
    find = JobQueue._find

    async def find_late(*arguments: Any) -> Any:
        await asyncio.sleep(0.1)
        return await find(*arguments)

    pauses = StreamLimits(first_poll_s=0.1, last_poll_s=0.1, max_away_s=0.3)
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    async with make_client(run_jobs=False, jobs={"database_url": url}, stream_limits=pauses) as (client, _):
        ticket = await submit(client)
        following = asyncio.create_task(client.get(f"/jobs/{ticket['id']}/events", timeout=PATIENCE_S))
        await wait_for_polls(reads)
        with closing(sqlite3.connect(tmp_path / "jobs.db")) as connection:
            connection.execute("DROP TABLE jobs")
        monkeypatch.setattr(JobQueue, "_find", find_late)
        num_before = len(reads)
        reply = await following
    assert len(reads) - num_before < 5
    assert [event["event"] for event in parse(reply.text)] == ["progress", "progress"]
    assert "event stream ended early" in (said := capsys.readouterr().out)
    assert "Traceback" not in said


async def test_any_replica_streams_any_job(tmp_path: Path) -> None:
    folder = str(tmp_path)
    async with (
        make_client(run_jobs=False, output_dir=folder, stream_limits=FAST) as (one, _),
        make_client(output_dir=folder, stream_limits=FAST) as (other, _),
    ):
        ticket = await submit(one)
        events = await read(other, ticket)
        assert ids(await read(one, ticket, after=str(ids(events)[0]))) == ids(events)[1:]
