from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx
import pytest
import structlog
from starlette.types import Message, Receive, Scope, Send

from stable_audio_serve.api.app import create_app
from stable_audio_serve.api.middleware.limits import LimitsMiddleware
from stable_audio_serve.api.middleware.observe import ObserveMiddleware
from stable_audio_serve.core.errors import OverloadedError, StorageError, StorageFullError
from stable_audio_serve.core.metrics import NullMetrics
from stable_audio_serve.core.settings import ApiSettings, Settings
from tests.backends import ToneBackend
from tests.patience import PATIENCE_S, until
from tests.recorded_metrics import RecordedMetrics

URL = "/v1/audio/generations"


@pytest.fixture
def lines() -> Any:
    merge = structlog.contextvars.merge_contextvars
    with structlog.testing.capture_logs(processors=[merge]) as lines:
        yield lines


async def test_one_log_line_per_request_without_its_prompt(
    client: httpx.AsyncClient, lines: list[dict[str, Any]]
) -> None:
    body = {"prompt": "my secret melody", "duration": 0.5, "sampler_kwargs": {"eta": 1}}
    reply = await client.post(URL, json=body, headers={"x-request-id": "id-1"})
    (request,) = lines
    assert request["event"] == "request"
    assert request["request_id"] == "id-1"
    assert request["ignored"] == ["sampler_kwargs.eta"]
    assert (request["route"], request["method"], request["status"]) == (URL, "POST", 200)
    assert (request["model"], request["duration_s"]) == ("small-sfx", 0.5)
    assert request["num_bytes"] == len(reply.content)
    assert "secret" not in str(lines)


async def test_client_errors_are_logged_at_info_with_the_field(
    client: httpx.AsyncClient, lines: list[dict[str, Any]]
) -> None:
    await client.post(URL, json={"prompt": "my secret melody", "steps": 0})
    (line,) = lines
    assert line["log_level"] == "info"
    assert (line["status"], line["refusal"], line["fields"]) == (422, "validation", ["steps"])
    assert "secret" not in str(line)


async def test_storage_errors_are_logged_with_the_reason(
    client: httpx.AsyncClient, backend: ToneBackend, lines: list[dict[str, Any]]
) -> None:
    for error in (StorageError("the bucket does not answer"), StorageFullError("the disk is full")):
        backend.error = error
        await client.post(URL, json={"prompt": "x"})
    assert [(line["refusal"], line["error"]) for line in lines] == [
        ("storage", "the bucket does not answer"),
        ("storage_full", "the disk is full"),
    ]


async def test_unexpected_error_is_logged_with_its_traceback(
    client: httpx.AsyncClient, backend: ToneBackend, lines: list[dict[str, Any]]
) -> None:
    backend.error = RuntimeError("what went wrong")
    await client.post(URL, json={"prompt": "x"}, headers={"x-request-id": "id-2"})
    assert [line["log_level"] for line in lines] == ["error", "error"]
    assert lines[0]["exc_info"] is True
    assert lines[0]["request_id"] == "id-2"


@pytest.mark.parametrize("url", ["/health", "/saos/health", "/ready", "/v1/status"])
async def test_polled_routes_are_logged_at_debug_unless_they_fail(
    url: str,
    client: httpx.AsyncClient,
    backend: ToneBackend,
    lines: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert (await client.get(url)).status_code == 200

    async def fail() -> None:
        raise RuntimeError("what went wrong")

    monkeypatch.setattr(backend, "status", fail)
    assert (await client.get(url)).status_code == 500
    assert [line["log_level"] for line in lines if line["event"] == "request"] == ["debug", "error"]


async def test_unready_server_is_logged_at_info(
    client: httpx.AsyncClient, backend: ToneBackend, lines: list[dict[str, Any]]
) -> None:
    backend.statuses = {}  # no model is loaded yet
    assert (await client.get("/ready")).status_code == 503
    assert [line["log_level"] for line in lines] == ["info"]


async def test_requests_refusals_and_audio_are_counted() -> None:
    metrics, backend = RecordedMetrics(), ToneBackend()
    transport = httpx.ASGITransport(create_app(backend, Settings(), metrics=metrics))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        await client.post(URL, json={"prompt": "x", "duration": 1.5, "batch_size": 2})
        await client.post(URL, json={"prompt": "x", "steps": 0})
        backend.error = OverloadedError("full", retry_after_s=1)
        await client.post(URL, json={"prompt": "x"})
        await client.get("/nope")
    assert metrics.counters == {
        ("http_requests", URL, "POST", "200"): 1,
        ("http_requests", URL, "POST", "422"): 1,
        ("http_requests", URL, "POST", "503"): 1,
        ("http_requests", "unmatched", "GET", "404"): 1,
        ("refusals", "validation"): 1,
        ("refusals", "overloaded"): 1,
        ("refusals", "404"): 1,
    }


async def test_a_running_request_counts_as_in_progress() -> None:
    metrics, backend = RecordedMetrics(), ToneBackend()
    backend.released.clear()
    transport = httpx.ASGITransport(create_app(backend, Settings(), metrics=metrics))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        running = asyncio.create_task(client.post(URL, json={"prompt": "x"}))
        await until(lambda: metrics.gauges.get("http_requests_in_progress") == 1)
        backend.released.set()
        assert (await running).status_code == 200
    assert metrics.gauges["http_requests_in_progress"] == 0


@pytest.mark.parametrize(("sent", "status"), [(b"sound", 200), (b"sou", 499)], ids=["all of it", "a part"])
@pytest.mark.parametrize("is_cancelled_by_the_server", [False, True])
async def test_disconnect_after_the_whole_response_is_not_499(
    sent: bytes, status: int, *, is_cancelled_by_the_server: bool, lines: list[dict[str, Any]]
) -> None:
    """A client may disconnect when it has the whole response, even if the request's handler has not returned yet."""
    has_sent, is_gone = asyncio.Event(), asyncio.Event()
    requests: list[Message] = [{"type": "http.request"}]

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await has_sent.wait()
        if is_cancelled_by_the_server:
            handling.cancel()
            await asyncio.Event().wait()
        is_gone.set()
        return {"type": "http.disconnect"}

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": sent, "more_body": True})
        has_sent.set()
        await is_gone.wait()
        await asyncio.sleep(0.01)  # time for the server to notice the disconnect
        await send({"type": "http.response.body"})

    async def drop(message: Message) -> None:
        pass

    metrics = NullMetrics()
    app = ObserveMiddleware(LimitsMiddleware(answer, limits=ApiSettings()), metrics=metrics)
    scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    handling = asyncio.create_task(app(scope, receive, drop))
    await asyncio.wait({handling}, timeout=PATIENCE_S)
    assert handling.cancelled() is is_cancelled_by_the_server
    assert [line["status"] for line in lines] == [status]


def test_importing_the_api_does_not_configure_logging() -> None:
    assert not logging.getLogger("stable_audio_serve.api").handlers
