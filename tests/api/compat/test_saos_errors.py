"""Each row of the error table of the Stable Audio Open Small dialect, and the documented deviations from the table."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from stable_audio_serve.core.errors import (
    DeadlineExceededError,
    GenerationError,
    InvalidRequestError,
    ModelUnavailableError,
    OverloadedError,
    StorageError,
    StorageFullError,
)
from tests.api.compat.saos import expect_refusal
from tests.api.compat.serving import make_client
from tests.audio_files import make_audio_file
from tests.backends import ToneBackend

JSON_URL = "/saos/generate"
LOOP = "/generate/loop"
STYLE = "/generate/style-transfer"
RIFF = "/generate/loop-with-riff"
WAV = make_audio_file(duration_s=0.2)

STEPS = "steps must be integer between 1-250"
STYLE_STEPS = "steps must be integer between 1-100"
CFG = "cfg_scale must be number between 0-20"
FORMAT = "return_format must be 'file' or 'base64'"
STRENGTH = "style_strength must be between 0.1-1.0"
BARS = "bars must be 1, 2, 4, or 8"
SEED = "seed must be integer, -1 for random"
TEMPO = "BPM must be specified in prompt (e.g., '120bpm')"
PROMPT_TYPE = "prompt must be a string of at most 100000 characters"
WHOLE = "seconds_total must be an integer number of seconds"

BAD_JSON: list[tuple[str, Any, str]] = [
    *[("prompt", value, "prompt is required") for value in ("", "   ", "\n")],
    *[("prompt", value, PROMPT_TYPE) for value in (None, 5, ["x"], {"a": 1}, True, "x" * 100_001)],
    *[("steps", value, STEPS) for value in (0, -1, 251, 10**30, 8.5, 8.0, "8", "many", True, [8], {})],
    *[("cfg_scale", value, CFG) for value in (-0.1, 20.01, 1e300, "6.0", None, True, [1])],
    *[("negative_prompt", value, "negative_prompt must be a string") for value in (5, ["x"])],
    *[("seed", value, SEED) for value in ("x", "5", 1.5, 5.0, None, [1], True)],
    *[("return_format", value, FORMAT) for value in ("wav", "", "FILE", None, 1, ["file"])],
    *[("seconds_total", value, "seconds_total must be >= 1") for value in (0, -1, 0.9, False, "-5", -(10**30))],
    *[("seconds_total", value, WHOLE) for value in ("x", "5.5", "", [5], {}, "9" * 5000)],
    *[("seconds_start", value, "seconds_start must be number >= 0") for value in (-1, "x", True)],
    *[("sampler_type", value, "sampler_type must be the name of a sampler") for value in (5, [])],
    *[("model_type", value, "model_type must be 'standard' or 'finetune'") for value in ("", "big", 1)],
    ("finetune_repo", 5, "finetune_repo must be a string"),
    ("finetune_checkpoint", [], "finetune_checkpoint must be a string"),
]


@pytest.mark.parametrize(("field", "value", "sentence"), BAD_JSON)
async def test_invalid_field_of_generate(client: httpx.AsyncClient, field: str, value: Any, sentence: str) -> None:
    expect_refusal(await client.post(JSON_URL, json={"prompt": "x", field: value}), sentence)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["steps", "cfg_scale", "seed", "seconds_total", "seconds_start"])
async def test_non_finite_numbers_are_refused(client: httpx.AsyncClient, field: str, literal: str) -> None:
    for url, prompt in ((JSON_URL, "x"), (LOOP, "x 120bpm")):
        if url == LOOP and field.startswith("seconds"):
            continue
        body = f'{{"prompt": "{prompt}", "{field}": {literal}}}'
        reply = await client.post(url, content=body, headers={"content-type": "application/json"})
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"].startswith(field)


async def test_first_of_several_errors_is_reported(client: httpx.AsyncClient) -> None:
    expect_refusal(await client.post(JSON_URL, json={"steps": 0, "cfg_scale": -1}), "prompt is required")
    expect_refusal(await client.post(JSON_URL, json={"prompt": "x", "steps": 0, "cfg_scale": -1}), STEPS)


@pytest.mark.parametrize(
    "content", [b"", b"prompt=x", b"{", b"[]", b"null", b"1", b'"x"', b'{"prompt": "\\ud800"}', b"\xff", b"[" * 10**5]
)
async def test_generate_accepts_json_only(client: httpx.AsyncClient, content: bytes) -> None:
    for content_type in ("application/json", "application/x-www-form-urlencoded", "text/plain", ""):
        reply = await client.post(JSON_URL, content=content, headers={"content-type": content_type})
        expect_refusal(reply, "JSON body required")


async def test_broken_json_body_of_the_loop(client: httpx.AsyncClient) -> None:
    for content in (b"", b"{", b"[]", b"null"):
        reply = await client.post(LOOP, content=content, headers={"content-type": "application/json; charset=utf-8"})
        expect_refusal(reply, "JSON body required")


BAD_LOOP: list[tuple[str, str, str]] = [
    *[("prompt", value, "prompt is required") for value in ("", "  ")],
    *[("prompt", value, TEMPO) for value in ("techno", "bpm 120", "0bpm", "120", "bpm", "120 b p m", "9" * 30 + "bpm")],
    *[("bars", value, BARS) for value in ("3", "0", "16", "-1", "two", "1.5", "4bars")],
    *[("style_strength", value, STRENGTH) for value in ("0", "0.09", "1.01", "-1", "x", "nan", "inf", "")],
    *[("steps", value, STEPS) for value in ("0", "-1", "251", "8.5", "many", "")],
    *[("cfg_scale", value, CFG) for value in ("-0.1", "20.1", "x", "nan", "")],
    *[("seed", value, SEED) for value in ("x", "1.5", "")],
    *[("return_format", value, FORMAT) for value in ("wav", "BASE64", "")],
]
BAD_RIFF = [*BAD_LOOP, *[("key", value, "key is required (e.g., 'gsharp', 'f', 'csharp')") for value in ("", " ")]]
BAD_STYLE = [
    *[
        (field, value, STYLE_STEPS if field == "steps" else sentence)
        for field, value, sentence in BAD_LOOP
        if field != "bars" and sentence != TEMPO
    ],
    ("steps", "101", STYLE_STEPS),
]


@pytest.mark.parametrize(("field", "value", "sentence"), BAD_LOOP)
async def test_invalid_field_of_the_loop(client: httpx.AsyncClient, field: str, value: str, sentence: str) -> None:
    fields = {"prompt": "x 120bpm", field: value}
    for body in ({"json": fields}, {"data": fields}, {"data": fields, "files": {"audio_file": WAV}}):
        expect_refusal(await client.post(LOOP, **body), sentence)


@pytest.mark.parametrize(("field", "value", "sentence"), BAD_RIFF)
async def test_invalid_field_of_the_riff_loop(client: httpx.AsyncClient, field: str, value: str, sentence: str) -> None:
    expect_refusal(await client.post(RIFF, data={"prompt": "x 120bpm", "key": "f", field: value}), sentence)


@pytest.mark.parametrize(("field", "value", "sentence"), BAD_STYLE)
async def test_invalid_field_of_style_transfer(
    client: httpx.AsyncClient, field: str, value: str, sentence: str
) -> None:
    reply = await client.post(STYLE, data={"prompt": "x", field: value}, files={"audio_file": WAV})
    expect_refusal(reply, sentence)


@pytest.mark.parametrize(
    ("url", "sent", "sentence"),
    [
        (JSON_URL, {"json": {}}, "prompt is required"),
        (LOOP, {"json": {}}, "prompt is required"),
        (LOOP, {"data": {"bars": "4"}}, "prompt is required"),
        (LOOP, {"content": b"x 120bpm", "headers": {"content-type": "text/plain"}}, "prompt is required"),
        (RIFF, {"data": {"key": "f"}}, "prompt is required"),
        (RIFF, {"data": {"prompt": "x 120bpm"}}, "key is required (e.g., 'gsharp', 'f', 'csharp')"),
        (RIFF, {"json": {"prompt": "x 120bpm", "key": "f"}}, "prompt is required"),
        (STYLE, {"data": {"prompt": "x"}}, "audio_file is required"),
        (STYLE, {"json": {"prompt": "x"}}, "audio_file is required"),
        (STYLE, {"files": {"audio_file": WAV}}, "prompt is required"),
        (
            STYLE,
            {"files": {"audio_file": (None, b"text"), "prompt": (None, b"x")}},
            "audio_file must be an uploaded file",
        ),
        (
            LOOP,
            {"files": {"audio_file": (None, b"t"), "prompt": (None, b"1bpm")}},
            "audio_file must be an uploaded file",
        ),
    ],
)
async def test_missing_field_is_named(client: httpx.AsyncClient, url: str, sent: dict[str, Any], sentence: str) -> None:
    expect_refusal(await client.post(url, **sent), sentence)


@pytest.mark.parametrize("url", [STYLE, LOOP])
@pytest.mark.parametrize(
    "upload", [b"", b"not audio", b"RIFF....WAVEfmt ", WAV[:44], b"\x00" * 100, b"ID3" + b"\xff" * 1000]
)
async def test_undecodable_upload_is_400(client: httpx.AsyncClient, url: str, upload: bytes) -> None:
    reply = await client.post(url, data={"prompt": "x 120bpm"}, files={"audio_file": ("a.wav", upload)})
    assert reply.status_code == 400, reply.text
    assert set(reply.json()) == {"error"}
    assert reply.json()["error"].startswith("audio_file: ")


async def test_upload_above_the_limit_is_413() -> None:
    """Covers a body just above the limit, and one so large that the server stops reading."""
    limit = 1_000_000
    async with make_client(api={"max_upload_bytes": limit}, run_jobs=False) as (client, _):
        for url in (STYLE, LOOP):
            for extra_bytes in (-100_000, 10_000_000):
                wav = WAV + bytes(limit + 200_000 + extra_bytes)
                reply = await client.post(url, data={"prompt": "x 120bpm"}, files={"audio_file": wav})
                assert reply.status_code == 413, (url, extra_bytes)
                sentence = "audio_file: the upload is larger than 1000000 bytes (api.max_upload_bytes)"
                assert reply.json() == {"error": sentence}


async def test_json_body_above_the_limit_is_413(client: httpx.AsyncClient) -> None:
    for url in (JSON_URL, LOOP):
        reply = await client.post(url, content=bytes(2_000_000), headers={"content-type": "application/json"})
        assert (reply.status_code, set(reply.json())) == (413, {"error"})


async def test_loop_shorter_than_one_sample_is_refused(client: httpx.AsyncClient) -> None:
    reply = await client.post(LOOP, data={"prompt": "x 99999999999bpm"})
    expect_refusal(reply, "prompt: 8 bars at 99999999999bpm are shorter than one sample")


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (OverloadedError("no room now", retry_after_s=7.2), 503, "no room now"),
        (ModelUnavailableError("still loading", retry_after_s=5), 503, "still loading"),
        (StorageError("the store is away", retry_after_s=2), 503, "the store is away"),
        (StorageFullError("the disk is full"), 507, "the disk is full"),
        (DeadlineExceededError("too late", field="deadline_s"), 504, "too late"),
        (GenerationError("secret path"), 500, None),
        (RuntimeError("secret text"), 500, None),
    ],
)
@pytest.mark.parametrize("url", ["/generate", JSON_URL, LOOP, STYLE])
async def test_server_errors_have_success_false(
    client: httpx.AsyncClient, backend: ToneBackend, url: str, error: Exception, status: int, sentence: str | None
) -> None:
    backend.error = error
    if url == STYLE:
        reply = await client.post(url, data={"prompt": "x"}, files={"audio_file": WAV})
    else:
        reply = await client.post(url, json={"prompt": "x 120bpm"})
    assert reply.status_code == status
    body = reply.json()
    assert body["success"] is False
    assert body["error"] == (sentence or f"generation failed; request id {reply.headers['x-request-id']}")
    assert "secret" not in reply.text
    retry_after_s = getattr(error, "retry_after_s", None)
    assert reply.headers.get("retry-after") == (None if retry_after_s is None else str(-(-retry_after_s // 1))[:1])


async def test_request_refused_by_the_model_is_400(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    backend.error = InvalidRequestError("cannot be so", field="cfg_scale")
    reply = await client.post(JSON_URL, json={"prompt": "x"})
    expect_refusal(reply, "cfg_scale: cannot be so")
    backend.error = InvalidRequestError("a clip of 12 s takes 4 GB", field="duration")
    expect_refusal(await client.post(JSON_URL, json={"prompt": "x"}), "seconds_total: a clip of 12 s takes 4 GB")


async def test_unknown_sampler_is_400(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    reply = await client.post(JSON_URL, json={"prompt": "x", "sampler_type": "x"})
    expect_refusal(reply, "sampler_type must be one of euler, rk4, dpmpp, pingpong")
    assert not backend.requests


@pytest.mark.parametrize("url", [JSON_URL, LOOP, STYLE, RIFF, "/generate"])
async def test_wrong_method_is_405(client: httpx.AsyncClient, url: str) -> None:
    assert (await client.get(url)).status_code == 405


@pytest.mark.parametrize(
    ("method", "url"),
    [
        *[("POST", url) for url in ("/generate/loop-guided", "/models/switch", "/models/checkpoints", "/cleanup")],
        ("POST", "/models/clear-cache"),
        ("GET", "/models/status"),
        ("GET", "/models/prompts"),
    ],
)
async def test_routes_without_a_model_are_absent(client: httpx.AsyncClient, method: str, url: str) -> None:
    for prefix in ("", "/saos"):
        assert (await client.request(method, prefix + url)).status_code == 404


async def test_prompt_never_appears_in_a_header(client: httpx.AsyncClient) -> None:
    hostile = 'x 120bpm\r\nX-Evil: 1"; filename="evil'
    for url in (JSON_URL, LOOP):
        reply = await client.post(url, json={"prompt": hostile, "loop_type": hostile})
        assert reply.status_code == 200
        assert "evil" not in json.dumps(dict(reply.headers)).lower()
