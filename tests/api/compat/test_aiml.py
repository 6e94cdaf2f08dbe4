"""The AIML API over HTTP, compared with each row of its documentation."""

from __future__ import annotations

import asyncio
import re
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from stable_audio_serve.core.errors import DeadlineExceededError, GenerationError, InvalidRequestError
from stable_audio_serve.jobs.runner.runner import JobRunner
from tests.api.compat.serving import make_client
from tests.api.compat.wav import read_wav
from tests.backends import ToneBackend
from tests.patience import PATIENCE_S

URL = "/v2/generate/audio"
BODY = {"model": "stable-audio", "prompt": "lo-fi pop hip-hop ambient music"}


async def submit(client: httpx.AsyncClient, **changes: Any) -> str:
    reply = await client.post(URL, json=BODY | changes)
    assert reply.status_code == 200, reply.text
    return reply.json()["id"]


async def poll_until(client: httpx.AsyncClient, generation_id: str, status: str) -> dict[str, Any]:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            reply = await client.get(URL, params={"generation_id": generation_id})
            assert reply.status_code == 200, reply.text
            body = reply.json()
            assert body["id"] == generation_id
            if body["status"] == status:
                return body
            assert body["status"] in ("queued", "generating")
            await asyncio.sleep(0.02)


async def test_submission_returns_an_id_and_a_status(client: httpx.AsyncClient) -> None:
    body = (await client.post(URL, json=BODY)).json()
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}:stable-audio", body.pop("id"))
    assert body == {"status": "queued", "meta": {"usage": {"credits_used": 0}}}


async def test_status_goes_from_queued_over_generating_to_completed(
    client: httpx.AsyncClient, backend: ToneBackend, runner: JobRunner
) -> None:
    backend.released.clear()
    generation_id = await submit(client)
    await poll_until(client, generation_id, "generating")
    backend.released.set()
    body = await poll_until(client, generation_id, "completed")
    assert body == await poll_until(client, generation_id, "completed")
    assert "error" not in body
    file = body["audio_file"]
    assert (file["content_type"], file["file_name"], file["file_size"]) == ("audio/wav", "generated.wav", 5_292_044)
    download = await client.get(file["url"])
    assert int(download.headers["x-seed"]) >= 0
    assert len(download.content) == file["file_size"]
    assert read_wav(download.content) == (44100, 2, 2, 30 * 44100)


async def test_job_without_a_runner_stays_queued(client: httpx.AsyncClient) -> None:
    body = await poll_until(client, await submit(client), "queued")
    assert body.keys() == {"id", "status", "meta"}


async def test_error_has_a_name_and_a_message(
    client: httpx.AsyncClient, backend: ToneBackend, runner: JobRunner
) -> None:
    backend.error = GenerationError("the model produced silence")
    body = await poll_until(client, await submit(client), "error")
    assert body["error"] == {"name": "generation_failed", "message": "the model produced silence"}
    assert "audio_file" not in body
    backend.error = InvalidRequestError("a clip of 30 s takes 4 GB", field="duration")
    body = await poll_until(client, await submit(client), "error")
    assert body["error"] == {"name": "invalid", "message": "seconds_total: a clip of 30 s takes 4 GB"}
    backend.error = DeadlineExceededError("not finished within 5 s", field="deadline_s")
    body = await poll_until(client, await submit(client), "error")
    assert body["error"] == {"name": "deadline_exceeded", "message": "not finished within 5 s"}


@pytest.mark.parametrize("encode", [str, lambda text: quote(text, safe=""), lambda text: quote(quote(text, safe=""))])
async def test_id_can_be_sent_raw_or_encoded(client: httpx.AsyncClient, encode: Any) -> None:
    generation_id = await submit(client)
    reply = await client.get(f"{URL}?generation_id={encode(generation_id)}")
    assert (reply.status_code, reply.json()["id"]) == (200, generation_id)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (30, 0.0, 100)),
        ({"seconds_start": 1, "seconds_total": 1, "steps": 1}, (1, 1.0, 1)),
        ({"seconds_start": 47, "seconds_total": 47, "steps": 1000}, (47, 47.0, 1000)),
        ({"seconds_total": 30.0, "provider": "stability", "anything": [1]}, (30, 0.0, 100)),
    ],
)
async def test_fields_defaults_and_ranges(
    client: httpx.AsyncClient, backend: ToneBackend, runner: JobRunner, fields: dict[str, Any], expected: Any
) -> None:
    await poll_until(client, await submit(client, **fields), "completed")
    assert (backend.last.duration_s, backend.last.start_s, backend.last.steps) == expected
    assert (backend.last.prompt, backend.last.cfg_scale) == (BODY["prompt"], None)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"model": None}, "model"),
        ({"model": "elevenlabs/eleven_music"}, "model"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "  "}, "prompt"),
        ({"prompt": 7}, "prompt"),
        *(({name: value}, name) for name in ("seconds_start", "seconds_total") for value in (0, 48, 1.5, "9", True)),
        *(({"steps": value}, "steps") for value in (0, 1001, 1.5, None, [1])),
    ],
)
async def test_an_invalid_body_is_400_and_names_the_field(
    client: httpx.AsyncClient, fields: dict[str, Any], field: str
) -> None:
    reply = await client.post(URL, json=BODY | fields)
    body = reply.json()
    assert (reply.status_code, body["statusCode"], body["error"], body["path"]) == (400, 400, "Bad Request", URL)
    assert body["message"].startswith(f"Body validation error! {field}: ")
    assert [fault["path"] for fault in body["meta"]] == [[field]]
    assert body["meta"][0].keys() == {"path", "message", "code"}


async def test_error_body_matches_the_documentation(client: httpx.AsyncClient) -> None:
    reply = await client.post(URL, json={"model": "stable-audio"})
    assert reply.json() == {
        "statusCode": 400,
        "message": "Body validation error! prompt: Field required",
        "error": "Bad Request",
        "path": URL,
        "meta": [{"path": ["prompt"], "message": "Field required", "code": "missing"}],
    }


@pytest.mark.parametrize(
    ("content", "names"),
    [(b"", ["model", "prompt"]), *((content, ["body"]) for content in (b"{", b'{"model": ,}', b"[]", b"null", b'"x"'))],
)
async def test_body_other_than_an_object_is_400(client: httpx.AsyncClient, content: bytes, names: list[str]) -> None:
    reply = await client.post(URL, content=content, headers={"content-type": "application/json"})
    body = reply.json()
    assert reply.status_code == 400
    assert body["message"].startswith(f"Body validation error! {names[0]}: ")
    assert [fault["path"] for fault in body["meta"]] == [[name] for name in names]


@pytest.mark.parametrize(
    ("query", "status", "error"),
    [
        ("", 400, "Bad Request"),
        ("?generation_id=no", 404, "Not Found"),
        ("?generation_id=ed58c4e0-2ed6-429f-91a1-b2c13a89ff46:stable-audio", 404, "Not Found"),
        ("?generation_id=..%2F..%2Fetc%2Fpasswd", 404, "Not Found"),
    ],
)
async def test_missing_or_unknown_id_is_an_error(
    client: httpx.AsyncClient, query: str, status: int, error: str
) -> None:
    reply = await client.get(f"{URL}{query}")
    body = reply.json()
    assert (reply.status_code, body["statusCode"], body["error"]) == (status, status, error)
    assert "generation_id" in body["message"]


async def test_alias_selects_the_configured_model() -> None:
    async with make_client(dialects={"model": "small-music"}) as (client, backend):
        for name, model in {"stable-audio": "small-music", "stable-audio-3-medium": "medium"}.items():
            await poll_until(client, await submit(client, model=name), "completed")
            assert backend.requests[-1][0] == model


async def test_short_model_limits_the_default_length() -> None:
    async with make_client(dialects={"model": "demo"}) as (client, backend):
        await poll_until(client, await submit(client), "completed")
        assert backend.last.duration_s == 5
        reply = await client.post(URL, json=BODY | {"seconds_total": 6})
    assert reply.status_code == 400
    assert "seconds_total: Input should be less than or equal to 5" in reply.json()["message"]


async def test_alias_is_unknown_in_other_dialects(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/audio/generations", json={"prompt": "x", "model": "stable-audio"})
    assert reply.status_code == 422


async def test_full_queue_is_429_with_retry_after() -> None:
    async with make_client(jobs={"max_queued": 1}, run_jobs=False) as (client, _):
        await submit(client)
        reply = await client.post(URL, json=BODY)
    assert (reply.status_code, reply.json()["statusCode"]) == (429, 429)
    assert reply.json()["error"] == "Too Many Requests"
    assert int(reply.headers["retry-after"]) >= 1


async def test_file_link_uses_the_host_of_the_request(client: httpx.AsyncClient, runner: JobRunner) -> None:
    generation_id = await submit(client)
    await poll_until(client, generation_id, "completed")
    headers = {"x-forwarded-proto": "https", "x-forwarded-host": "audio.example.org"}
    reply = await client.get(URL, params={"generation_id": generation_id}, headers=headers)
    assert reply.json()["audio_file"]["url"].startswith("https://audio.example.org/files/")


async def test_routes_exist_below_the_dialects_prefix(client: httpx.AsyncClient) -> None:
    reply = await client.post(f"/aiml{URL}", json=BODY)
    generation_id = reply.json()["id"]
    assert (await client.get(f"/aiml{URL}", params={"generation_id": generation_id})).status_code == 200
