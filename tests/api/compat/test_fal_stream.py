"""fal's status stream over HTTP: one event per change of the job, with the new log lines, until the job ends."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from stable_audio_serve.api.streams import StreamLimits
from stable_audio_serve.core.errors import GenerationError
from tests.api.compat.serving import make_client, serve_app
from tests.backends import ToneBackend
from tests.patience import PATIENCE_S, until

pytestmark = pytest.mark.server

QUEUE = "/queue/fal-ai/stable-audio"
QUICK = StreamLimits(first_poll_s=0.05)
BODY = {"prompt": "Trömmelwirbel", "seconds_total": 1}


async def submit(client: httpx.AsyncClient) -> dict[str, Any]:
    return (await client.post(QUEUE, json=BODY)).json()


async def read_stream(client: httpx.AsyncClient, ticket: dict[str, Any], query: str = "?logs=1") -> list[Any]:
    """Read the job's status stream to its end. Returns the JSON of each event; any deviation from the format fails."""
    reply = await client.get(f"{ticket['status_url']}/stream{query}", timeout=PATIENCE_S)
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-fal-request-id"] == ticket["request_id"]
    blocks = reply.text.removesuffix("\n\n").split("\n\n")
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert reply.text.isascii()
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


async def test_stream_reports_every_change_until_the_end(reads: list[str]) -> None:
    async with make_client(jobs={"max_running": 1}, stream_limits=QUICK) as (client, backend):
        backend.released.clear()
        first, second = await submit(client), await submit(client)
        enough = len(reads) + 3
        following = asyncio.create_task(read_stream(client, second))
        await until(lambda: len(reads) >= enough)  # the route reads the job first, then the stream polls it
        backend.released.set()
        events = await following
        assert [event["status"] for event in events][:1] == ["IN_QUEUE"]
        assert {event["status"] for event in events} == {"IN_QUEUE", "IN_PROGRESS", "COMPLETED"}
        assert [event["status"] for event in events].count("COMPLETED") == 1
        assert events[-1]["status"] == "COMPLETED"
        assert (await read_stream(client, first))[-1]["status"] == "COMPLETED"
        polled = (await client.get(f"{second['status_url']}?logs=1")).json()
    entries = [entry for event in events for entry in event.get("logs") or []]
    assert entries == polled["logs"]  # each line once, in order
    assert all(event["status_url"] == second["status_url"] for event in events)


async def test_streams_without_logs_and_of_ended_requests() -> None:
    async with make_client(stream_limits=QUICK) as (client, backend):
        for query in ("", "?logs=0", "?logs=false"):
            events = await read_stream(client, await submit(client), query)
            assert all(event["logs"] is None for event in events if event["status"] != "IN_QUEUE"), query
            assert events[-1]["metrics"]["inference_time"] >= 0, query
        backend.error = GenerationError("silence")
        ticket = await submit(client)
        await read_stream(client, ticket)
        (event,) = await read_stream(client, ticket)
    assert (event["status"], event["error_type"]) == ("COMPLETED", "internal_error")


async def test_cancelled_request_ends_its_stream(reads: list[str]) -> None:
    async with make_client(ToneBackend(delay_s=30), stream_limits=QUICK) as (client, _):
        ticket = await submit(client)
        following = asyncio.create_task(read_stream(client, ticket))
        await until(lambda: len(reads) >= 3)  # the route reads the job first, then the stream polls it
        await client.put(ticket["cancel_url"])
        events = await following
    assert (events[-1]["status"], events[-1]["error_type"]) == ("COMPLETED", "client_cancelled")


async def test_unknown_request_has_no_stream(client: httpx.AsyncClient) -> None:
    reply = await client.get(f"{QUEUE}/requests/{uuid.uuid4()}/status/stream")
    assert (reply.status_code, reply.headers["content-type"]) == (404, "application/json")


@asynccontextmanager
async def open_stream(path: str, headers: dict[str, str]) -> AsyncIterator[AsyncIterator[str]]:
    async with (
        serve_app(ToneBackend(delay_s=30), stream_limits=StreamLimits(comment_s=0.2)) as (port, _),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client,
    ):
        ticket = await submit(client)
        url = path.format(**ticket)
        named = {name: value.format(**ticket) for name, value in headers.items()}
        async with client.stream("GET", url, headers=named) as reply:
            yield reply.aiter_lines()


STREAMS = {
    "direct": ("{status_url}/stream", {}),
    "proxied": (
        "/api/fal/proxy",
        {"x-fal-target-url": "https://queue.fal.run/fal-ai/stable-audio/requests/{request_id}/status/stream"},
    ),
}


@pytest.mark.parametrize("way", STREAMS)
async def test_first_event_is_immediate_and_comments_keep_the_connection(way: str) -> None:
    assert StreamLimits().comment_s < 15
    async with open_stream(*STREAMS[way]) as lines, asyncio.timeout(PATIENCE_S):
        # On a slow machine, comments come before the first event.
        first = await anext(line async for line in lines if line and not line.startswith(":"))
        assert json.loads(first.removeprefix("data: "))["status"] in ("IN_QUEUE", "IN_PROGRESS")
        async for line in lines:
            if line.startswith(":"):
                break
