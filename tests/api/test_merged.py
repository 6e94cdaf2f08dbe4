"""Two dialects share `POST /generate`: how a request selects its dialect, and errors that fit both dialects."""

from __future__ import annotations

import base64
import io
import zipfile
from typing import Any

import httpx
import pytest

from stable_audio_serve.api.shared_routes.merged import ONLY_SA3
from stable_audio_serve.core.errors import InvalidRequestError, OverloadedError
from stable_audio_serve.core.keys import hash_key
from tests.api.compat.saos import CLIP_KEYS, WINDOW_SAMPLES, expect_base64, expect_wav
from tests.api.compat.serving import make_client
from tests.backends import ToneBackend

URL = "/generate"
SA3_NAME = r"stable-audio-3-small-sfx\.wav"
SAOS_NAME = r"stable_audio_\d+_\d+\.wav"

SA3_FIELDS: list[tuple[str, Any]] = [
    ("model", "small-sfx"),
    ("duration", 7),
    ("batch_size", 1),
    ("apg_scale", 0.5),
    ("duration_padding_sec", 2),
    ("sampler_kwargs", {}),
    ("chunked_decode", None),
]
SAOS_FIELDS: list[tuple[str, Any]] = [
    ("return_format", "file"),
    ("seconds_total", 12),
    ("seconds_start", 0),
    ("sampler_type", "euler"),
    ("model_type", "standard"),
    ("finetune_repo", None),
    ("finetune_checkpoint", None),
]
FORM_FIELDS: list[tuple[str, Any]] = [("bars", 4), ("loop_type", "drums"), ("style_strength", 0.5), ("key", "f")]
SHARED: dict[str, Any] = {"steps": 8, "cfg_scale": 1.0, "seed": 1, "negative_prompt": "hiss"}


def test_fields_that_select_a_dialect() -> None:
    assert {name for name, _ in SA3_FIELDS} <= ONLY_SA3
    assert not ONLY_SA3 & {*SHARED, *(name for name, _ in SAOS_FIELDS + FORM_FIELDS), "prompt"}


@pytest.mark.parametrize(("field", "value"), SA3_FIELDS)
async def test_field_of_stable_audio_3_selects_it(client: httpx.AsyncClient, field: str, value: Any) -> None:
    for others in ({}, SHARED | dict(SAOS_FIELDS)):  # it wins if fields of both kinds are present
        reply = await client.post(URL, json={"prompt": "x", **others, field: value})
        assert len(expect_wav(reply, name=SA3_NAME)) == 7 * 44_100


async def test_other_fields_select_open_small(client: httpx.AsyncClient) -> None:
    for others in ({}, SHARED | dict([*SAOS_FIELDS, *FORM_FIELDS, ("unknown", 1)])):
        reply = await client.post(URL, json={"prompt": "x", **others})
        assert len(expect_wav(reply, name=SAOS_NAME)) == WINDOW_SAMPLES


async def test_both_dialects_support_base64(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    body = {"prompt": "x 90bpm", "duration": 2, "seed": 5, "return_format": "base64"}
    reply = await client.post(URL, json=body)
    pcm, metadata = expect_base64(reply)
    assert len(pcm) == 2 * 44_100
    assert abs(int(pcm.max()) - 16_384) < 10  # the backend's peak of 0.5, not normalized
    assert set(metadata) == CLIP_KEYS
    fields = {"prompt": "x 90bpm", "steps": 8, "cfg_scale": 1.0, "seed": 5, "duration_seconds": 2.0, "detected_bpm": 90}
    assert fields.items() <= metadata.items()
    assert (reply.headers["x-model"], reply.headers["x-output-count"]) == ("small-sfx", "1")
    assert backend.last.cfg_scale is None


async def test_several_variations_in_base64_are_a_zip(client: httpx.AsyncClient) -> None:
    body = {"prompt": "x", "duration": 1, "batch_size": 2, "return_format": "base64"}
    reply = await client.post(URL, json=body)
    assert reply.status_code == 200
    archive = zipfile.ZipFile(io.BytesIO(base64.b64decode(reply.json()["audio_base64"])))
    assert archive.namelist() == ["stable-audio-3-small-sfx-01.wav", "stable-audio-3-small-sfx-02.wav"]


@pytest.mark.parametrize("prefix", ["/sa3", "/saos"])
async def test_prefix_selects_one_dialect(client: httpx.AsyncClient, prefix: str) -> None:
    name = SA3_NAME if prefix == "/sa3" else SAOS_NAME
    for body in ({"prompt": "x"}, {"prompt": "x", "duration": 7}, {"prompt": "x", "seconds_total": 11}):
        pcm = expect_wav(await client.post(prefix + URL, json=body), name=name)
        assert len(pcm) == (7 * 44_100 if prefix == "/sa3" else 485_100 if "seconds_total" in body else WINDOW_SAMPLES)
    wrong = (await client.post(prefix + URL, json={"prompt": ""})).json()
    assert set(wrong) == ({"detail"} if prefix == "/sa3" else {"error"})


def expect_both(reply: httpx.Response, status: int, *fields: str) -> str:
    """Assert that one error body has both dialects' formats and names these fields. Returns the error message."""
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert set(body) == {"error", "detail"}
    assert [item["loc"][-1] for item in body["detail"]] == list(fields)
    for item in body["detail"]:
        assert {"type", "loc", "msg", "input"} <= set(item)
    assert fields[0] in body["error"]
    return str(body["error"])


@pytest.mark.parametrize(
    ("body", "status", "fields"),
    [
        ({}, 400, ["prompt"]),
        ({"prompt": " "}, 400, ["prompt"]),
        ({"prompt": "x", "steps": 251}, 400, ["steps"]),
        ({"prompt": "x", "steps": "8"}, 400, ["steps"]),
        ({"prompt": "x", "steps": 0, "cfg_scale": 99}, 400, ["steps", "cfg_scale"]),
        ({"prompt": "x", "return_format": "wav"}, 400, ["return_format"]),
        ({"prompt": "x", "seconds_total": 0}, 400, ["seconds_total"]),
        ({"duration": 3}, 422, ["prompt"]),
        ({"prompt": "x", "duration": 0}, 422, ["duration"]),
        ({"prompt": "x", "duration": 9999}, 422, ["duration"]),
        ({"prompt": "x", "duration": 3, "steps": 51}, 422, ["steps"]),
        ({"prompt": "x", "model": "huge"}, 422, ["model"]),
        ({"prompt": "x", "sampler_kwargs": {"steps": 1}}, 422, ["sampler_kwargs"]),
        ({"prompt": "x", "duration": 3, "return_format": "wav"}, 422, ["return_format"]),
        ({"prompt": "x", "seconds_total": 0, "batch_size": 99}, 422, ["batch_size"]),
    ],
)
async def test_errors_have_the_dialects_status_and_both_formats(
    client: httpx.AsyncClient, body: dict[str, Any], status: int, fields: list[str]
) -> None:
    expect_both(await client.post(URL, json=body), status, *fields)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"prompt=x"])
async def test_body_other_than_an_object_is_an_open_small_error(client: httpx.AsyncClient, content: bytes) -> None:
    reply = await client.post(URL, content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"] == "JSON body required"
    assert [item["loc"] for item in reply.json()["detail"]] == [["body"]]


@pytest.mark.parametrize("fields", [{}, {"duration": 1}])
async def test_request_refused_by_the_model_is_400(
    client: httpx.AsyncClient, backend: ToneBackend, fields: dict[str, Any]
) -> None:
    backend.error = InvalidRequestError("cannot be so", field="cfg_scale")
    reply = await client.post(URL, json={"prompt": "x", **fields})
    assert reply.status_code == 400
    body = reply.json()
    assert body["error"] == "cfg_scale: cannot be so"
    assert body["detail"] == body["error"] if fields else body["detail"][0]["loc"] == ["body", "cfg_scale"]


@pytest.mark.parametrize("fields", [{}, {"duration": 1}])
async def test_overload_is_reported_in_both_formats(
    client: httpx.AsyncClient, backend: ToneBackend, fields: dict[str, Any]
) -> None:
    backend.error = OverloadedError("no room now", retry_after_s=3)
    reply = await client.post(URL, json={"prompt": "x", **fields})
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "3")
    body = reply.json()
    assert body.pop("success", False) is False
    assert body == {"error": "no room now", "detail": "no room now"}


async def test_internal_error_is_opaque_in_both_formats(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    backend.error = RuntimeError("secret")
    for fields in ({}, {"duration": 1}):
        reply = await client.post(URL, json={"prompt": "x", **fields})
        assert reply.status_code == 500
        assert {"error", "detail"} <= set(reply.json())
        assert "secret" not in reply.text


async def test_key_and_size_errors_are_in_both_formats() -> None:
    async with make_client(api={"key_hashes": [hash_key(b"key")]}) as (client, _):
        for headers, size, status in (({}, 10, 401), ({"authorization": "Bearer key"}, 1_048_577, 413)):
            reply = await client.post(URL, content=bytes(size), headers=headers)
            assert reply.status_code == status
            body = reply.json()
            assert body["error"] == body["detail"]
            assert ("www-authenticate" in reply.headers) == (status == 401)
