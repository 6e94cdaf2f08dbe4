"""A stopping server refuses new requests in each dialect's format and finishes the running requests."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from stable_audio_serve.api.middleware.draining import Draining
from stable_audio_serve.core.errors import StoppingError
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.jobs.runner.runner import JobRunner
from tests.api.compat.serving import make_app
from tests.api.test_jobs import submit
from tests.backends import ToneBackend
from tests.factories import FakeClock
from tests.patience import PATIENCE_S, until

GENERATE = "/v1/audio/generations"
BODY = {"prompt": "a bell", "duration": 1}

# One request of each kind of each dialect, with the keys and indices that lead to the message in its error body.
NEW = [
    ("POST", GENERATE, BODY, ["detail"]),
    ("POST", "/jobs", BODY, ["detail"]),
    ("GET", "/jobs", None, ["detail"]),
    ("GET", f"/files/{'0' * 32}/clip.wav", None, ["detail"]),
    ("POST", "/saos/generate", {"prompt": "a bell"}, ["error"]),
    ("POST", "/vllm/v1/audio/generate", {"input": "a bell"}, ["error", "message"]),
    ("GET", "/vllm/v1/models", None, ["error", "message"]),
    ("POST", "/v1/sound-generation", {"text": "a bell"}, ["detail", "message"]),
    ("POST", "/v2/generate/audio", {"model": "stable-audio", "prompt": "a bell"}, ["message"]),
    ("POST", "/queue/fal-ai/stable-audio", {"prompt": "a bell"}, ["detail"]),
]


def draining_of(app: FastAPI) -> Draining:
    return app.state.draining


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")


async def test_new_requests_are_refused_and_running_ones_finish() -> None:
    async with make_app(ToneBackend(), run_jobs=False) as (app, backend), client_of(app) as client:
        backend.released.clear()
        draining = draining_of(app)
        busy = asyncio.create_task(client.post(GENERATE, json=BODY))
        await until(lambda: backend.num_running == 1)
        assert draining.num_in_flight == 1
        draining.stop()
        for method, path, body, place in NEW:
            refused = await client.request(method, path, json=body)
            assert refused.status_code == 503, (path, refused.text)
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.headers["connection"] == "close"
            message: Any = refused.json()
            for key in place:
                message = message[key]
            assert "stopping" in json.dumps(message)
        assert (await client.get("/ready")).status_code == 503
        for path in ("/health", "/saos/health"):
            assert (await client.get(path)).status_code == 200
        assert draining.num_in_flight == 1  # refused requests and health checks do not count
        backend.released.set()
        answer = await busy
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert answer.content.startswith(b"RIFF")
        assert draining.num_in_flight == 0


def stopping(clock: FakeClock, *, request_at: float | None = None, check_at: float | None = None) -> Draining:
    """Return a server that stops at second 100, and got a request and a check of /ready before."""
    draining = Draining(clock)
    if request_at is not None:
        clock.now = request_at
        draining.admit({"method": "POST"})
    if check_at is not None:
        clock.now = check_at
        draining.check()
    clock.now = 100
    assert not draining.may_exit
    draining.stop()
    return draining


@pytest.mark.parametrize(
    ("request_at", "check_at", "exits_at"), [(None, None, 100), (96, 89, 100), (98, None, 101), (96, 91, 103)]
)
def test_stop_waits_if_new_requests_may_arrive(
    request_at: float | None, check_at: float | None, exits_at: float
) -> None:
    clock = FakeClock()
    draining = stopping(clock, request_at=request_at, check_at=check_at)
    assert draining.may_exit == (exits_at == 100)
    clock.now = exits_at - 0.1
    draining.stop()  # the launcher repeats its call
    assert draining.may_exit == (exits_at == 100)
    clock.now = exits_at
    assert draining.may_exit


def test_stop_waits_while_requests_arrive_but_not_forever() -> None:
    """On a slow machine, a load balancer needs longer than usual to see that /ready fails."""
    clock = FakeClock()
    draining = stopping(clock)
    for clock.now in (102, 104, 106, 109.9):
        with pytest.raises(StoppingError):
            draining.admit({"method": "POST"})
        assert not draining.may_exit
    clock.now = 110
    assert draining.may_exit


async def test_check_of_ready_is_noticed() -> None:
    async with make_app(run_jobs=False) as (app, _), client_of(app) as client:
        assert (await client.get("/ready")).status_code == 200
        draining_of(app).stop()
        assert not draining_of(app).may_exit


@pytest.mark.parametrize("dialect", ["native", "fal"])
async def test_event_streams_of_a_replaced_process_ask_for_a_reconnect(dialect: str) -> None:
    async with make_app(run_jobs=False) as (app, _), client_of(app) as client:
        ticket = await submit(client)
        path = f"/jobs/{ticket['id']}/events"
        if dialect == "fal":
            queued = await client.post("/queue/fal-ai/stable-audio", json={"prompt": "a bell"})
            path = f"{queued.json()['status_url']}/stream"
        following = asyncio.create_task(client.get(path))
        await until(lambda: draining_of(app).num_in_flight == 1)
        await asyncio.sleep(0.1)
        assert not following.done()  # the event stream stays open, because its job is still queued
        draining_of(app).leave()
        stream = await asyncio.wait_for(following, timeout=PATIENCE_S)
        *events, farewell = stream.text.removesuffix("\n\n").split("\n\n")
        assert events
        assert farewell.startswith("retry: ")
        assert farewell.removeprefix("retry: ").isdigit()
        assert "event: end" not in stream.text
        assert (await client.post(GENERATE, json=BODY)).status_code == 200
        assert (await client.get(path)).text.endswith(f"{farewell}\n\n")  # a new stream ends at once


@pytest.mark.parametrize("path", ["/v1/music", "/v1/music/stream", "fal"])
@pytest.mark.parametrize("how", ["drain", "leave"])
async def test_running_jobs_of_open_requests_finish(path: str, how: str) -> None:
    """Neither ElevenLabs' clients nor fal's JavaScript client reconnect."""
    sections = [{"section_name": name, "duration_ms": 3000, "positive_local_styles": [name]} for name in "ab"]
    async with make_app() as (app, backend), client_of(app) as client:
        backend.released.clear()
        if path == "fal":
            queued = (await client.post("/queue/fal-ai/stable-audio", json={"prompt": "a bell"})).json()
            sending = asyncio.create_task(client.get(f"{queued['status_url']}/stream"))
        else:
            body = {"composition_plan": {"positive_global_styles": ["jazz"], "sections": sections}}
            query = {"output_format": "pcm_44100"}
            sending = asyncio.create_task(client.post(path, params=query, json=body))
        await until(lambda: backend.num_running == 1 and draining_of(app).num_in_flight == 1)
        await asyncio.sleep(0.1)
        getattr(draining_of(app), how)()
        await asyncio.sleep(0.1)
        assert not sending.done()
        backend.released.set()
        reply = await asyncio.wait_for(sending, timeout=PATIENCE_S)
    assert reply.status_code == 200
    assert "COMPLETED" in reply.text if path == "fal" else len(reply.content) % (6 * 44_100) == 0


@pytest.mark.parametrize("path", ["/v1/music", "/v1/music/stream"])
async def test_request_of_a_replaced_process_waits_for_the_next_runner(path: str, reads: list[str]) -> None:
    sections = [{"section_name": name, "duration_ms": 3000, "positive_local_styles": [name]} for name in "ab"]
    body = {"composition_plan": {"positive_global_styles": ["jazz"], "sections": sections}}
    async with make_app(run_jobs=False) as (app, backend), client_of(app) as client:
        queue = app.state.jobs
        backend.released.clear()
        sending = asyncio.create_task(client.post(path, params={"output_format": "pcm_44100"}, json=body))
        first, second = [
            JobRunner(queue.store, queue.artifacts, backend=backend, settings=Settings()) for _ in range(2)
        ]
        await first.start()
        await until(lambda: backend.num_running == 1)
        draining_of(app).leave()
        await first.close()
        enough = len(reads) + 5
        await until(lambda: sending.done() or len(reads) >= enough)
        backend.released.set()
        await second.start()
        assert (await sending).status_code == 200
        await second.close()


@pytest.mark.parametrize("path", ["/v1/music", "/v1/music/stream"])
async def test_piece_that_a_drained_server_cannot_start_is_503(path: str) -> None:
    sections = [{"section_name": name, "duration_ms": 3000, "positive_local_styles": [name]} for name in "ab"]
    body = {"composition_plan": {"positive_global_styles": ["jazz"], "sections": sections}}
    async with make_app(run_jobs=False) as (app, _), client_of(app) as client:
        sending = asyncio.create_task(client.post(path, params={"output_format": "pcm_44100"}, json=body))
        await until(lambda: app.state.jobs.store.operators.counts().get("queued"))
        draining_of(app).drain()
        reply = await asyncio.wait_for(sending, timeout=PATIENCE_S)
        assert (reply.status_code, reply.json()["detail"]["status"]) == (503, "service_unavailable")
        assert int(reply.headers["retry-after"]) >= 1


async def test_jobs_of_a_drained_server_can_be_cancelled() -> None:
    queue = "/queue/fal-ai/stable-audio"
    async with make_app(run_jobs=False) as (app, _), client_of(app) as client:
        native = (await client.post("/jobs", json=BODY)).json()["id"]
        first, second = [(await client.post(queue, json={"prompt": "a bell"})).json()["request_id"] for _ in range(2)]
        draining_of(app).drain()
        target = {"x-fal-target-url": f"https://queue.fal.run/fal-ai/stable-audio/requests/{second}/cancel"}
        assert (await client.delete(f"/jobs/{native}")).status_code == 200
        assert (await client.put(f"{queue}/requests/{first}/cancel")).status_code == 202
        assert (await client.put("/api/fal/proxy", headers=target)).status_code == 202
        assert app.state.jobs.store.operators.counts() == {"cancelled": 3}
        target["x-fal-target-url"] = "https://queue.fal.run/fal-ai/stable-audio"
        for path, headers in ((queue, {}), ("/api/fal/proxy", target)):
            reply = await client.post(path, json={"prompt": "a bell"}, headers=headers)
            assert (reply.status_code, reply.headers["x-fal-error-type"]) == (503, "unavailable")
        draining_of(app).stop()
        assert (await client.delete(f"/jobs/{native}")).status_code == 503


async def test_request_counts_until_its_response_is_sent() -> None:
    """The response to a slow client is still in flight after the handler has returned."""
    async with make_app(run_jobs=False) as (app, _):
        gate = asyncio.Event()
        sent: list[dict[str, Any]] = []
        body = json.dumps(BODY).encode()

        async def receive() -> dict[str, Any]:
            if sent_body:
                await asyncio.Event().wait()
            sent_body.append(body)
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(event: Any) -> None:
            sent.append(event)
            if event["type"] == "http.response.body":
                await gate.wait()

        sent_body: list[bytes] = []
        scope = {
            "type": "http",
            "method": "POST",
            "path": GENERATE,
            "raw_path": GENERATE.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "http_version": "1.1",
            "asgi": {"version": "3.0"},
        }
        answering = asyncio.create_task(app(scope, receive, send))  # type: ignore[arg-type]
        await until(lambda: len(sent) == 2)
        assert draining_of(app).num_in_flight == 1
        gate.set()
        await answering
        assert draining_of(app).num_in_flight == 0
