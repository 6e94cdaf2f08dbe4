"""fal's client proxy over HTTP: a header names a fal URL, and this server answers in place of fal."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from stable_audio_serve.jobs.runner.runner import JobRunner
from tests.backends import ToneBackend
from tests.patience import PATIENCE_S

URL = "/api/fal/proxy"
APP = "fal-ai/stable-audio"
BODY = {"prompt": "rain", "seconds_total": 1}


async def call(client: httpx.AsyncClient, method: str, target: str, **options: Any) -> httpx.Response:
    return await client.request(method, URL, headers={"x-fal-target-url": target}, **options)


async def test_a_run_returns_audio(client: httpx.AsyncClient) -> None:
    reply = await call(client, "POST", f"https://fal.run/{APP}", json=BODY)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-fal-request-id"]
    assert reply.json()["audio_file"]["content_type"] == "audio/wav"


async def test_a_queued_request_returns_its_result(client: httpx.AsyncClient, runner: JobRunner) -> None:
    reply = await call(client, "POST", f"https://queue.fal.run/{APP}?fal_webhook=", json=BODY)
    assert reply.status_code == 422  # the query is invalid, so the proxy forwards it
    ticket = (await call(client, "POST", f"https://queue.fal.run/{APP}", json=BODY)).json()
    requests = f"https://queue.fal.run/{APP}/requests/{ticket['request_id']}"
    assert (await client.get(ticket["status_url"])).status_code in (200, 202)  # the link is to the server, not to fal
    async with asyncio.timeout(PATIENCE_S):
        while (reply := await call(client, "GET", f"{requests}/status?logs=1")).status_code == 202:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert isinstance(reply.json()["logs"], list)
    reply = await call(client, "GET", requests)
    assert reply.headers["x-fal-request-id"] == ticket["request_id"]
    assert reply.json()["audio_file"]["file_size"] == 44 + 4 * 44100
    reply = await call(client, "PUT", f"{requests}/cancel")
    assert (reply.status_code, reply.json()) == (400, {"status": "ALREADY_COMPLETED"})


async def test_an_upload_is_announced(client: httpx.AsyncClient) -> None:
    target = "https://rest.fal.ai/storage/upload/initiate?storage_type=fal-cdn-v3"
    reply = await call(client, "POST", target, json={"content_type": "audio/wav", "file_name": "a.wav"})
    place = reply.json()
    assert place["file_url"].startswith("http://localhost/files/")
    assert (await client.put(place["upload_url"], content=b"abc")).status_code == 200
    assert (await client.get(place["file_url"])).content == b"abc"


async def test_errors_keep_status_body_and_headers(client: httpx.AsyncClient) -> None:
    reply = await call(client, "POST", f"https://fal.run/{APP}", json={"prompt": ""})
    assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, ["body", "prompt"])
    assert reply.headers["x-fal-retryable"] == "false"
    assert (await call(client, "POST", "https://fal.run/fal-ai/other", json=BODY)).status_code == 404
    assert (await call(client, "GET", f"https://queue.fal.run/{APP}/requests/x")).status_code == 404
    assert (await call(client, "DELETE", f"https://fal.run/{APP}")).status_code == 405


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
async def test_a_missing_header_is_400(client: httpx.AsyncClient, method: str) -> None:
    reply = await client.request(method, URL)
    assert reply.status_code == 400
    assert "x-fal-target-url" in reply.json()["detail"]


@pytest.mark.parametrize(
    "target",
    [
        *("https://example.org/fal-ai/stable-audio", "http://127.0.0.1:8000/health", "https://fal.run.evil.example/x"),
        *("https://evil.example#fal.run", "https://evil.example/?fal.run", "https://user@fal.run/x", "https://fal.ai/"),
        *("https://fal.run:8443/x", "https://fal.run@evil.example/", "//fal.run/x", "/fal-ai/stable-audio", "fal.run"),
        *(
            "ftp://fal.run/x",
            "file:///etc/passwd",
            "https://[::1",
            "https://xfal.run/",
            "",
            " ",
            "https://v3.fal.media/x",
        ),
    ],
)
async def test_every_other_host_is_412(client: httpx.AsyncClient, backend: ToneBackend, target: str) -> None:
    reply = await call(client, "POST", target, json=BODY)
    assert reply.status_code == 412
    assert "fal.run" in reply.json()["detail"]
    assert backend.requests == []


@pytest.mark.parametrize(
    "target",
    [
        *("https://rest.fal.ai/api/fal/proxy", "https://rest.fal.ai/health", "https://fal.run/v1/audio/generations"),
        *("https://fal.run/../health", "https://fal.run/%2e%2e/health", "https://rest.fal.ai/", "https://fal.run"),
    ],
)
async def test_proxy_reaches_only_fals_routes(client: httpx.AsyncClient, target: str) -> None:
    reply = await call(client, "GET", target)
    assert reply.status_code in (404, 405), reply.text


async def test_proxy_exists_below_the_dialects_prefix(client: httpx.AsyncClient) -> None:
    headers = {"x-fal-target-url": f"https://queue.fal.run/{APP}"}
    reply = await client.post(f"/fal{URL}", json=BODY, headers=headers)
    ticket = reply.json()
    assert (await client.get(ticket["status_url"])).status_code == 202
