from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import httpx
import pytest
import structlog

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.errors import OverloadedError
from stable_audio_serve.core.metrics import NullMetrics
from stable_audio_serve.core.settings import Settings
from tests.backends import ToneBackend

URL = "/v1/audio/generations"


class CountingMetrics(NullMetrics):
    def __init__(self) -> None:
        self.counters: Counter[tuple[str, ...]] = Counter()

    def increment(self, name: str, value: float = 1.0, **tags: str) -> None:
        self.counters[(name, *tags.values())] += value  # type: ignore[assignment]


@pytest.fixture
def lines() -> Any:
    merge = structlog.contextvars.merge_contextvars
    with structlog.testing.capture_logs(processors=[merge]) as lines:
        yield lines


async def test_one_line_per_request_with_its_id_and_without_its_prompt(
    client: httpx.AsyncClient, lines: list[dict[str, Any]]
) -> None:
    body = {"prompt": "my secret melody", "duration": 0.5, "sampler_kwargs": {"eta": 1}}
    reply = await client.post(URL, json=body, headers={"x-request-id": "id-1"})
    ignored, request = lines
    assert ignored["event"] == "sampler_kwargs ignored"
    assert ignored["keys"] == ["eta"]
    assert request["event"] == "request"
    assert ignored["request_id"] == request["request_id"] == "id-1"
    assert (request["route"], request["method"], request["status"]) == (URL, "POST", 200)
    assert (request["model"], request["duration_s"]) == ("small-sfx", 0.5)
    assert request["num_bytes"] == len(reply.content)
    assert "secret" not in str(lines)


async def test_client_mistakes_stay_at_info_and_say_which_field(
    client: httpx.AsyncClient, lines: list[dict[str, Any]]
) -> None:
    await client.post(URL, json={"prompt": "my secret melody", "steps": 0})
    (line,) = lines
    assert line["log_level"] == "info"
    assert (line["status"], line["refusal"], line["fields"]) == (422, "validation", ["steps"])
    assert "secret" not in str(line)


async def test_a_bug_is_logged_as_an_error_with_its_trace(
    client: httpx.AsyncClient, backend: ToneBackend, lines: list[dict[str, Any]]
) -> None:
    backend.error = RuntimeError("what went wrong")
    await client.post(URL, json={"prompt": "x"}, headers={"x-request-id": "id-2"})
    assert [line["log_level"] for line in lines] == ["error", "error"]
    assert lines[0]["exc_info"] is True
    assert lines[0]["request_id"] == "id-2"


async def test_requests_refusals_and_audio_are_counted() -> None:
    metrics, backend = CountingMetrics(), ToneBackend()
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


def test_importing_the_api_leaves_logging_alone() -> None:
    assert not logging.getLogger("stable_audio_serve.api").handlers
