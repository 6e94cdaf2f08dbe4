"""fal's synchronous calls over HTTP: the model's input and output, and the choice between queued and direct calls."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from stable_audio_serve.core.errors import (
    DeadlineExceededError,
    GenerationError,
    ModelUnavailableError,
    OverloadedError,
    QuotaError,
    StorageError,
    StorageFullError,
)
from tests.api.compat.serving import make_client
from tests.api.compat.wav import read_wav
from tests.backends import ToneBackend

URL = "/fal-ai/stable-audio"
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


async def test_run_returns_a_stored_file(client: httpx.AsyncClient) -> None:
    reply = await client.post(URL, json={"prompt": "tech house"})
    assert reply.status_code == 200
    assert UUID.fullmatch(reply.headers["x-fal-request-id"])
    file = reply.json()["audio_file"]
    assert file.keys() == {"url", "content_type", "file_name", "file_size"}
    assert (file["content_type"], file["file_name"][-4:], file["file_size"]) == ("audio/wav", ".wav", 5_292_044)
    download = await client.get(file["url"])
    assert int(download.headers["x-seed"]) >= 0
    assert (download.headers["content-type"], len(download.content)) == ("audio/wav", file["file_size"])
    assert read_wav(download.content) == (44100, 2, 2, 30 * 44100)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (30, 0.0, 100)),
        ({"seconds_start": 0, "seconds_total": 1, "steps": 2}, (1, 0.0, 2)),
        ({"seconds_start": 47, "seconds_total": 47, "steps": 1000, "unknown": {}}, (47, 47.0, 1000)),
    ],
)
async def test_fields_defaults_and_ranges(
    client: httpx.AsyncClient, backend: ToneBackend, fields: dict[str, Any], expected: tuple[float, float, int]
) -> None:
    reply = await client.post(URL, json={"prompt": "rain"} | fields)
    assert reply.status_code == 200, reply.text
    assert (backend.last.duration_s, backend.last.start_s, backend.last.steps) == expected
    assert read_wav((await client.get(reply.json()["audio_file"]["url"])).content)[3] == expected[0] * 44100


INVALID: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "string_type"),
    ({"prompt": ""}, "prompt", "string_too_short"),
    ({"prompt": " \n"}, "prompt", "string_too_short"),
    ({"prompt": ["x"]}, "prompt", "string_type"),
    ({"seconds_start": -1}, "seconds_start", "greater_than_equal"),
    ({"seconds_start": 48}, "seconds_start", "less_than_equal"),
    ({"seconds_total": 0}, "seconds_total", "greater_than_equal"),
    ({"seconds_total": -1}, "seconds_total", "greater_than_equal"),
    ({"seconds_total": 48}, "seconds_total", "less_than_equal"),
    ({"seconds_total": 1.5}, "seconds_total", "int_from_float"),
    ({"seconds_total": "30"}, "seconds_total", "int_type"),
    ({"seconds_total": True}, "seconds_total", "int_type"),
    ({"steps": 1}, "steps", "greater_than_equal"),
    ({"steps": 1001}, "steps", "less_than_equal"),
    ({"steps": 10**30}, "steps", "less_than_equal"),
    ({"steps": None}, "steps", "int_type"),
]


@pytest.mark.parametrize("path", [URL, f"/queue{URL}"])
@pytest.mark.parametrize(("fields", "field", "kind"), INVALID)
async def test_input_error_is_422_and_names_the_field(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], field: str, kind: str
) -> None:
    reply = await client.post(path, json={"prompt": "rain"} | fields)
    assert (reply.status_code, reply.headers["content-type"]) == (422, "application/json")
    assert reply.headers["x-fal-retryable"] == "false"
    (entry,) = reply.json()["detail"]
    assert (entry["loc"], entry["type"]) == (["body", field], kind)
    assert entry["msg"]
    assert "input" in entry


@pytest.mark.parametrize("content", [b"", b"{}", b'{"steps": 5}'])
async def test_a_missing_prompt_is_named(client: httpx.AsyncClient, content: bytes) -> None:
    reply = await client.post(URL, content=content, headers={"content-type": "application/json"})
    (entry,) = reply.json()["detail"]
    assert (reply.status_code, entry["loc"], entry["type"]) == (422, ["body", "prompt"], "missing")


async def test_short_model_limits_the_default_length() -> None:
    async with make_client(dialects={"model": "demo"}) as (client, backend):
        assert (await client.post(URL, json={"prompt": "x"})).status_code == 200
        assert backend.requests[-1][0] == "demo"
        assert backend.last.duration_s == 5
        assert (await client.post(URL, json={"prompt": "x", "seconds_total": 5})).status_code == 200
        reply = await client.post(URL, json={"prompt": "x", "seconds_total": 6})
    (entry,) = reply.json()["detail"]
    assert (reply.status_code, entry["loc"], entry["ctx"]) == (422, ["body", "seconds_total"], {"le": 5})


@pytest.mark.parametrize(
    ("path", "headers", "is_queue"),
    [
        (URL, {}, False),
        (f"/run{URL}", {}, False),
        (f"/queue{URL}", {}, True),
        (URL, {"host": "queue.fal.run"}, True),
        (URL, {"host": "queue.localhost:8000"}, True),
        (URL, {"x-forwarded-host": "queue.example.org"}, True),
        (f"/run{URL}", {"host": "queue.fal.run"}, False),
        (URL, {"x-fal-target-url": "https://queue.fal.run/fal-ai/stable-audio"}, False),
        (f"/fal{URL}", {}, False),
        (f"/fal/run{URL}", {}, False),
        (f"/fal/queue{URL}", {}, True),
        (f"{URL}/sub/endpoint", {}, False),
        (f"/queue{URL}/x", {}, True),
    ],
)
async def test_path_then_host_selects_queue_or_run(
    client: httpx.AsyncClient, path: str, headers: dict[str, str], is_queue: bool
) -> None:
    reply = await client.post(path, json={"prompt": "x", "seconds_total": 1}, headers=headers)
    assert reply.status_code == 200, reply.text
    assert ("audio_file" in reply.json(), "status_url" in reply.json()) == (not is_queue, is_queue)


@pytest.mark.parametrize(
    "path",
    [
        *("/fal-ai/fast-sdxl", "/run/fal-ai/fast-sdxl", "/queue/fal-ai/fast-sdxl", "/queue/other/stable-audio"),
        *(f"{URL}/stream", f"/run{URL}/stream", f"/queue{URL}/requests", f"{URL}/realtime", "/queue/fal-ai"),
    ],
)
async def test_unknown_applications_are_404(client: httpx.AsyncClient, path: str) -> None:
    reply = await client.post(path, json={"prompt": "x"})
    assert (reply.status_code, reply.headers["content-type"]) == (404, "application/json")
    assert isinstance(reply.json()["detail"], str)


@pytest.mark.parametrize(
    ("error", "status", "error_type", "retryable"),
    [
        (OverloadedError("too many", retry_after_s=3.2), 429, "overloaded", "true"),
        (ModelUnavailableError("loading", retry_after_s=1), 503, "unavailable", "true"),
        (GenerationError("NaN in /srv/secret"), 500, "internal_error", "false"),
        (StorageError("a file could not be kept"), 503, "storage", "true"),
        (StorageFullError("the disk is full"), 507, "storage_full", "false"),
        (QuotaError("too many", retry_after_s=3.2), 429, "quota", "true"),
        (DeadlineExceededError("the time budget ran out"), 500, "generation_timeout", "false"),
    ],
)
async def test_platform_error_has_a_sentence_and_a_type(
    client: httpx.AsyncClient, backend: ToneBackend, error: Exception, status: int, error_type: str, retryable: str
) -> None:
    backend.error = error
    reply = await client.post(URL, json={"prompt": "x"})
    assert reply.status_code == status
    assert reply.json().keys() == {"detail", "error_type"}
    assert (reply.json()["error_type"], reply.headers["x-fal-error-type"]) == (error_type, error_type)
    assert reply.headers["x-fal-retryable"] == retryable
    assert UUID.fullmatch(reply.headers["x-fal-request-id"])
    assert "secret" not in reply.text
    assert ("retry-after" in reply.headers) == (retryable == "true")


async def test_run_that_cannot_start_in_time_is_504(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    backend.queue_s = 5.0
    reply = await client.post(URL, json={"prompt": "x"}, headers={"x-fal-request-timeout": "0.05"})
    assert (reply.status_code, reply.json()["error_type"]) == (504, "request_timeout")
    assert reply.headers["x-fal-request-timeout-type"] == "user"
    assert reply.headers["x-fal-error-type"] == "request_timeout"


async def test_started_run_may_exceed_the_start_timeout(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    backend.delay_s = 0.2
    reply = await client.post(URL, json={"prompt": "x"}, headers={"x-fal-request-timeout": "0.05"})
    assert reply.status_code == 200


@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "nan", "inf", "1e999"])
async def test_start_timeout_must_be_a_number_of_seconds(client: httpx.AsyncClient, value: str) -> None:
    reply = await client.post(URL, json={"prompt": "x"}, headers={"x-fal-request-timeout": value})
    assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, ["header", "x-fal-request-timeout"])


async def test_unknown_headers_are_ignored(client: httpx.AsyncClient) -> None:
    headers = {
        "x-fal-runner-hint": "a",
        "x-fal-object-lifecycle-preference": '{"expiration_duration_seconds": 60}',
        "x-fal-no-retry": "1",
        "x-app-fal-disable-fallback": "true",
        "authorization": "Key whatever:x",
    }
    reply = await client.post(URL, json={"prompt": "x", "seconds_total": 1}, headers=headers)
    assert reply.status_code == 200


async def test_pages_of_allowed_origins_can_read_the_request_id(client: httpx.AsyncClient) -> None:
    origin = {"origin": "http://localhost:3000"}
    for method in ("GET", "POST", "PUT"):
        preflight = {
            "access-control-request-method": method,
            "access-control-request-headers": "x-fal-target-url,content-type,authorization",
        }
        reply = await client.options("/api/fal/proxy", headers=origin | preflight)
        assert reply.status_code == 200
        assert method in reply.headers["access-control-allow-methods"]
        assert "x-fal-target-url" in reply.headers["access-control-allow-headers"].lower()
    reply = await client.post(URL, json={"prompt": "x", "seconds_total": 1}, headers=origin)
    assert reply.headers["access-control-allow-origin"] == origin["origin"]
    assert "x-fal-request-id" in reply.headers["access-control-expose-headers"].lower()
