"""vLLM-Omni's error table: OpenAI's error object, with the status as `code` and the field as `param`."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from stable_audio_serve.core.errors import (
    DeadlineExceededError,
    GenerationError,
    InvalidRequestError,
    ModelUnavailableError,
    OverloadedError,
    QuotaError,
    StableAudioError,
    StorageError,
    StorageFullError,
)
from tests.backends import ToneBackend

URL = "/v1/audio/generate"
JSON = {"content-type": "application/json"}


def expect_error(reply: httpx.Response, status: int, kind: str, param: str | None) -> str:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert set(reply.json()) == {"error"}
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["type"], error["param"]) == (status, kind, param)
    assert error["message"]
    return str(error["message"])


BAD_FIELDS: list[tuple[str, Any]] = [
    *[("input", value) for value in ("", "   ", "\n\t", None, 5, ["a"], {"a": 1}, "x" * 100_001)],
    *[("model", value) for value in (5, ["medium"], {})],
    *[("response_format", value) for value in ("aac", "ogg", "WAV", "", "../wav", 1, None)],
    *[("speed", value) for value in (0.24, 4.01, 0, -1, "fast", [1], 1e300)],
    *[("stream_format", value) for value in ("sse", "text", "", 1)],
    *[("audio_length", value) for value in (0, -1, -0.001, "long", [1], {})],
    *[("audio_start", value) for value in ("late", [1])],
    *[("negative_prompt", value) for value in (5, ["x"])],
    *[("guidance_scale", value) for value in (-0.1, 1000.1, "x", [])],
    *[("num_inference_steps", value) for value in (0, -1, 1001, 1.5, "many", 10**30)],
    *[("seed", value) for value in (2**63, -(2**63) - 1, 1.5, "x", 10**40)],
]


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
async def test_invalid_field_is_named(client: httpx.AsyncClient, field: str, value: Any) -> None:
    reply = await client.post(URL, json={"input": "x", "audio_length": 1, field: value})
    assert field in expect_error(reply, 400, "Bad Request", field)


async def test_input_is_required(client: httpx.AsyncClient) -> None:
    expect_error(await client.post(URL, json={"prompt": "x"}), 400, "Bad Request", "input")
    expect_error(await client.post(URL, content=b"", headers=JSON), 400, "Bad Request", "input")


async def test_sse_is_not_supported_yet(client: httpx.AsyncClient) -> None:
    reply = await client.post(URL, json={"input": "x", "stream_format": "sse"})
    assert "not supported yet" in expect_error(reply, 400, "Bad Request", "stream_format")


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    "field", ["speed", "audio_length", "audio_start", "guidance_scale", "num_inference_steps", "seed"]
)
async def test_non_finite_numbers_are_refused(client: httpx.AsyncClient, field: str, literal: str) -> None:
    body = f'{{"input": "x", "{field}": {literal}}}'
    expect_error(await client.post(URL, content=body, headers=JSON), 400, "Bad Request", field)


@pytest.mark.parametrize("content", [b"{", b"null", b"[]", b'"x"', b"1", b"\xff\xfe", b"[" * 50_000])
async def test_body_other_than_an_object_is_400(client: httpx.AsyncClient, content: bytes) -> None:
    expect_error(await client.post(URL, content=content, headers=JSON), 400, "Bad Request", "body")


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "application/ld+json", "json", None]
)
async def test_other_content_types_are_refused(client: httpx.AsyncClient, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    reply = await client.post(URL, content=b'{"input": "x"}', headers=headers)
    assert "application/json" in expect_error(reply, 400, "Bad Request", "Content-Type")


async def test_forms_are_refused(client: httpx.AsyncClient) -> None:
    expect_error(await client.post(URL, data={"input": "x"}), 400, "Bad Request", "Content-Type")
    reply = await client.post(URL, data={"input": "x"}, files={"audio": b"x"})
    expect_error(reply, 400, "Bad Request", "Content-Type")


async def test_too_large_body_is_413(client: httpx.AsyncClient) -> None:
    reply = await client.post(URL, content=b" " * 2_000_000 + b'{"input": "x"}', headers=JSON)
    expect_error(reply, 413, "Bad Request", "body")


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"audio_length": 120.1}, "audio_length", ("exceeds maximum", "120")),
        ({"audio_length": 1e300}, "audio_length", ("exceeds maximum", "120")),
        ({"audio_length": 381, "model": "medium"}, "audio_length", ("exceeds maximum", "380")),
        *(({"audio_length": 1, "audio_start": start}, "audio_start", ("512",)) for start in (-1e-3, -5, 513, 1e300)),
        ({"audio_length": 1, "audio_start": 120}, "audio_start", ("120",)),
        ({"audio_length": 200, "audio_start": 350, "model": "medium"}, "audio_start", ("512",)),
    ],
)
async def test_invalid_span_is_refused(
    client: httpx.AsyncClient, fields: dict[str, Any], field: str, words: tuple[str, ...]
) -> None:
    message = expect_error(await client.post(URL, json={"input": "x", **fields}), 400, "BadRequestError", field)
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", ["xxx", "stable-audio", "", "gpt-4", "../medium", "x" * 5000])
async def test_unknown_model_is_404(client: httpx.AsyncClient, name: str) -> None:
    message = expect_error(await client.post(URL, json={"input": "x", "model": name}), 404, "NotFoundError", "model")
    assert message == f"The model `{name[:100]}` does not exist."


async def test_invalid_field_is_reported_before_an_unknown_model(client: httpx.AsyncClient) -> None:
    reply = await client.post(URL, json={"input": "", "model": "xxx"})
    expect_error(reply, 400, "Bad Request", "input")


@pytest.mark.parametrize(
    ("error", "status", "kind", "param"),
    [
        (InvalidRequestError("prompt is not valid", field="prompt"), 400, "BadRequestError", "input"),
        (InvalidRequestError("steps must be few", field="steps"), 400, "BadRequestError", "num_inference_steps"),
        (OverloadedError("no room", retry_after_s=3), 503, "ServiceUnavailableError", None),
        (QuotaError("your queue is full", retry_after_s=3), 429, "RateLimitError", None),
        (ModelUnavailableError("loading"), 503, "ServiceUnavailableError", None),
        (StorageError("no database", retry_after_s=3), 503, "ServiceUnavailableError", None),
        (StorageFullError("the disk is full"), 507, "InternalServerError", None),
        (DeadlineExceededError("out of time"), 504, "TimeoutError", None),
        (GenerationError("secret path"), 500, "InternalServerError", None),
        (RuntimeError("secret path"), 500, "InternalServerError", None),
    ],
)
async def test_errors_of_the_generation(
    client: httpx.AsyncClient, backend: ToneBackend, error: Exception, status: int, kind: str, param: str | None
) -> None:
    backend.error = error
    reply = await client.post(URL, json={"input": "x", "audio_length": 1})
    message = expect_error(reply, status, kind, param)
    assert "secret" not in message
    assert param is None or param in message
    assert reply.headers.get("retry-after") == (
        "3" if isinstance(error, StableAudioError) and error.retry_after_s else None
    )


async def test_other_methods_and_unknown_paths(client: httpx.AsyncClient) -> None:
    expect_error(await client.get(URL), 405, "Method Not Allowed", None)
    for path in ("/v1/audio/speech", "/v1/chat/completions", "/v1/audio", "/vllm", "/vllm/nope"):
        reply = await client.post(path, json={})
        assert (reply.status_code, reply.json()) == (404, {"detail": "Not Found"})
