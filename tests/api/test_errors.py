"""Each row of the error table of the native API's documentation, and the fields that all error bodies share."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.errors import (
    CheckpointError,
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
from stable_audio_serve.core.settings import Settings
from tests.api.compat.serving import make_client
from tests.audio_files import make_audio_file
from tests.backends import ToneBackend

URL = "/v1/audio/generations"
VARIATIONS = "/v1/audio/variations"
INPAINT = "/v1/audio/inpaint"
WAV = make_audio_file(duration_s=0.5)


def expect_fields(reply: httpx.Response, *fields: str) -> None:
    """Assert a 422 response whose `detail` is a list of errors about exactly these fields."""
    assert reply.status_code == 422, reply.text
    items = reply.json()["detail"]
    assert [item["loc"][-1] for item in items] == list(fields)
    for item in items:
        assert {"type", "loc", "msg", "input"} <= set(item)
        assert item["loc"][0] == "body"


def expect_sentence(reply: httpx.Response, status: int, *words: str) -> None:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    detail = reply.json()["detail"]
    assert isinstance(detail, str)
    for word in words:
        assert word in detail


BAD_CONTROLS: list[tuple[str, Any]] = [
    *[("prompt", value) for value in ("", "   ", "\n\t")],
    *[("model", value) for value in ("huge", "stable-audio", "../small-sfx")],
    *[("duration", value) for value in (0, -1, 120.1, 1e300, "abc", "NaN", "inf", "-Infinity")],
    *[("steps", value) for value in (0, -1, 51, 8.5, "8.5", "many", 10**30)],
    *[("cfg_scale", value) for value in (-0.1, 20.5, "x", "nan")],
    *[("batch_size", value) for value in (0, 5, 1.5, "two")],
    *[("seed", value) for value in ("x", 1.5, "1e3")],
    *[("chunked_decode", value) for value in ("maybe", 2)],
    *[("apg_scale", value) for value in (-1, 10.1, "nan")],
    *[("duration_padding_sec", value) for value in (-1, 30.5)],
    *[("response_format", value) for value in ("wave", "mp5")],
    *[("deadline_s", value) for value in (0, -1, 1e9, "inf")],
]


@pytest.mark.parametrize(("field", "value"), BAD_CONTROLS)
async def test_invalid_control_is_named_in_json(client: httpx.AsyncClient, field: str, value: Any) -> None:
    expect_fields(await client.post(URL, json={"prompt": "x", field: value}), field)


@pytest.mark.parametrize(("field", "value"), BAD_CONTROLS)
async def test_invalid_control_is_named_in_forms(client: httpx.AsyncClient, field: str, value: Any) -> None:
    form = {"prompt": "x", "duration": "5", "inpaint_start_seconds": "1", "inpaint_end_seconds": "2", field: str(value)}
    for url in (VARIATIONS, INPAINT):
        expect_fields(await client.post(url, data=form, files={"audio": WAV}), field)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["duration", "cfg_scale", "apg_scale", "duration_padding_sec", "steps", "seed"])
async def test_non_finite_json_literals(client: httpx.AsyncClient, field: str, literal: str) -> None:
    body = f'{{"prompt": "x", "{field}": {literal}}}'
    expect_fields(await client.post(URL, content=body, headers={"content-type": "application/json"}), field)


@pytest.mark.parametrize(
    "field",
    [
        "prompt",
        "model",
        "duration",
        "steps",
        "cfg_scale",
        "batch_size",
        "seed",
        "apg_scale",
        "duration_padding_sec",
        "sampler_kwargs",
    ],
)
async def test_null_is_refused_where_it_has_no_meaning(client: httpx.AsyncClient, field: str) -> None:
    expect_fields(await client.post(URL, json={"prompt": "x", field: None}), field)


async def test_null_means_the_default_where_allowed(client: httpx.AsyncClient) -> None:
    body = {"prompt": "x", "duration": 0.1, "negative_prompt": None, "chunked_decode": None}
    assert (await client.post(URL, json=body)).status_code == 200


@pytest.mark.parametrize("field", ["prompt", "duration", "steps", "seed", "model", "sampler_kwargs", "chunked_decode"])
@pytest.mark.parametrize("value", [[1], {"a": 1}, [[[]]]])
async def test_wrong_json_types_are_refused(client: httpx.AsyncClient, field: str, value: Any) -> None:
    reply = await client.post(URL, json={"prompt": "x", field: value})
    if field == "sampler_kwargs" and value == {"a": 1}:
        assert reply.status_code == 200
    else:
        expect_fields(reply, field)


@pytest.mark.parametrize("key", ["prompt", "seed", "duration", "init_audio", "return_latents", "dist_shift", "steps"])
async def test_reserved_sampler_kwargs_are_refused(client: httpx.AsyncClient, key: str) -> None:
    expect_fields(await client.post(URL, json={"prompt": "x", "sampler_kwargs": {key: 1}}), "sampler_kwargs")
    form = {"prompt": "x", "sampler_kwargs": json.dumps({key: 1})}
    expect_fields(await client.post(VARIATIONS, data=form, files={"audio": WAV}), "sampler_kwargs")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"": 1},
        {" ": 1},
        {"a": [1]},
        {"a": {"b": 1}},
        {"scale_phi": 2},
        {"scale_phi": "x"},
        {"scale_phi": -0.1},
        {"scale_phi": True},
        {"cfg_norm_threshold": -1},
        {"cfg_norm_threshold": "5"},
        {"cfg_norm_threshold": 1e300},
        {"sampler_type": 3},
        {"sampler_type": ""},
        {"sampler_type": False},
    ],
)
async def test_invalid_sampler_kwargs_are_refused(client: httpx.AsyncClient, kwargs: dict[str, Any]) -> None:
    expect_fields(await client.post(URL, json={"prompt": "x", "sampler_kwargs": kwargs}), "sampler_kwargs")
    form = {"prompt": "x", "sampler_kwargs": json.dumps(kwargs)}
    expect_fields(await client.post(VARIATIONS, data=form, files={"audio": WAV}), "sampler_kwargs")


@pytest.mark.parametrize("text", ["[1]", "1", '"a"', "null", "{", "nope", "{'a': 1}"])
async def test_sampler_kwargs_other_than_an_object_are_refused(client: httpx.AsyncClient, text: str) -> None:
    reply = await client.post(VARIATIONS, data={"prompt": "x", "sampler_kwargs": text}, files={"audio": WAV})
    expect_sentence(reply, 400, "sampler_kwargs")


async def test_blank_sampler_kwargs_are_empty(client: httpx.AsyncClient) -> None:
    for text in ("", "  ", "{}"):
        form = {"prompt": "x", "duration": "0.1", "sampler_kwargs": text}
        assert (await client.post(VARIATIONS, data=form, files={"audio": WAV})).status_code == 200


async def test_unknown_model_error_lists_the_valid_names(client: httpx.AsyncClient) -> None:
    reply = await client.post(URL, json={"prompt": "x", "model": "huge"})
    expect_fields(reply, "model")
    for name in ("small-sfx", "small-music", "medium"):
        assert name in reply.json()["detail"][0]["msg"]


@pytest.mark.parametrize("url", [URL, "/jobs"])
async def test_field_that_an_empty_body_lacks_is_named(client: httpx.AsyncClient, url: str) -> None:
    expect_fields(await client.post(url, content=b"", headers={"content-type": "application/json"}), "prompt")


async def test_several_errors_are_reported_together(client: httpx.AsyncClient) -> None:
    reply = await client.post(URL, json={"prompt": "", "steps": 0, "cfg_scale": 99})
    expect_fields(reply, "prompt", "steps", "cfg_scale")
    expect_fields(await client.post(URL, json={"prompt": "x", "duration": 400, "steps": 99}), "duration", "steps")


@pytest.mark.usefixtures("low_rate")
async def test_limits_of_server_and_model_both_apply() -> None:
    settings = Settings.model_validate({"api": {"max_duration_s": 150}})
    transport = httpx.ASGITransport(create_app(ToneBackend(), settings))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        expect_fields(await client.post(URL, json={"prompt": "x", "model": "medium", "duration": 151}), "duration")
        expect_fields(await client.post(URL, json={"prompt": "x", "duration": 121}), "duration")
        reply = await client.post(URL, json={"prompt": "x", "model": "medium", "duration": 149})
        assert reply.status_code == 200


@pytest.mark.parametrize("url", [VARIATIONS, INPAINT])
async def test_missing_upload_is_named(client: httpx.AsyncClient, url: str) -> None:
    expect_fields(await client.post(url, data={"prompt": "x"}), "audio")
    expect_fields(await client.post(url, data={"prompt": "x", "audio": "text"}), "audio")
    expect_fields(await client.post(url, json={"duration": 1}), "prompt", "audio")


@pytest.mark.parametrize("value", [-0.1, 1.1, "nan", "x"])
async def test_invalid_noise_level_is_named(client: httpx.AsyncClient, value: Any) -> None:
    reply = await client.post(VARIATIONS, data={"prompt": "x", "init_noise_level": value}, files={"audio": WAV})
    expect_fields(reply, "init_noise_level")


@pytest.mark.parametrize(
    ("starts", "ends", "field"),
    [
        *[
            (start, "5", "inpaint_start_seconds")
            for start in (None, "", " ", "x", "-1", "nan", "inf", "1_0", "[", "[]")
        ],
        *[("1", end, "inpaint_end_seconds") for end in (None, "", " ", "x", "-1", "nan", "inf", "true", "{}")],
        *[(start, "5", "inpaint_start_seconds") for start in ("5", "6", "1,2", "[1]", "1,", "[", "[]")],
        *[("1", end, "inpaint_end_seconds") for end in ("7.1", "99999999999")],
        *[(start, "[2,4]", "inpaint_start_seconds") for start in ("1", "[1]", "1,", "[1,2,3]", "[2,1]", "[1,null]")],
        *[(start, "[2,4]", "inpaint_start_seconds") for start in ("[1,true]", "[1,[2]]", "[NaN,1]", '["a",1]', ",,1")],
        ("[" * 10_000, "2", "inpaint_start_seconds"),
        ("9" * 10_000, "2", "inpaint_start_seconds"),
        (",".join(["1"] * 5000), ",".join(["2"] * 5000), "inpaint_start_seconds"),
    ],
)
async def test_invalid_inpaint_times_are_named(
    client: httpx.AsyncClient, starts: str | None, ends: str | None, field: str
) -> None:
    form = {"prompt": "x", "inpaint_start_seconds": starts, "inpaint_end_seconds": ends}
    form = {name: value for name, value in form.items() if value is not None}
    expect_sentence(await client.post(INPAINT, data=form, files={"audio": WAV}), 400, field)


async def test_time_and_its_alias_together_are_refused(client: httpx.AsyncClient) -> None:
    form = {"prompt": "x", "inpaint_start_seconds": "1", "inpaint_end_seconds": "2", "inpaint_mask_end_seconds": "2"}
    expect_sentence(await client.post(INPAINT, data=form, files={"audio": WAV}), 400, "inpaint_mask_end_seconds")


@pytest.mark.parametrize("url", [VARIATIONS, INPAINT])
@pytest.mark.parametrize("upload", [b"", b"not audio", WAV[:20], b"\x00" * 5000, b"PK\x03\x04" + b"\x00" * 100])
async def test_unusable_upload_is_400(client: httpx.AsyncClient, url: str, upload: bytes) -> None:
    form = {"prompt": "x", "inpaint_start_seconds": "1", "inpaint_end_seconds": "2"}
    expect_sentence(await client.post(url, data=form, files={"audio": ("a.wav", upload)}), 400, "audio")


async def test_checks_run_in_the_order_of_the_contract(client: httpx.AsyncClient) -> None:
    bad_upload = {"audio": ("a.wav", b"")}
    form = {"prompt": "x", "steps": "0", "duration": "999", "inpaint_start_seconds": "9", "inpaint_end_seconds": "8"}
    expect_fields(await client.post(INPAINT, data=form, files=bad_upload), "steps")
    form["steps"] = "8"
    expect_fields(await client.post(INPAINT, data=form, files=bad_upload), "duration")
    form["duration"] = "10"
    expect_sentence(await client.post(INPAINT, data=form, files=bad_upload), 400, "inpaint_start_seconds")
    form["inpaint_end_seconds"] = "10"
    expect_sentence(await client.post(INPAINT, data=form, files=bad_upload), 400, "audio")


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (InvalidRequestError("cannot be 0", field="init_noise_level"), 400, ("init_noise_level", "cannot be 0")),
        (InvalidRequestError("too long", field="duration"), 400, ("duration",)),
        (OverloadedError("the queue is full", retry_after_s=2.2), 503, ("full",)),
        (QuotaError("too many of yours are waiting", retry_after_s=2.2), 429, ("yours",)),
        (ModelUnavailableError("the model is loading"), 503, ("loading",)),
        (StorageError("the database is away", retry_after_s=2.2), 503, ("away",)),
        (StorageFullError("the disk is full"), 507, ("full",)),
        (DeadlineExceededError("deadline_s: late"), 504, ("deadline_s",)),
    ],
)
async def test_errors_of_the_model(
    client: httpx.AsyncClient, backend: ToneBackend, error: StableAudioError, status: int, words: tuple[str, ...]
) -> None:
    backend.error = error
    reply = await client.post(URL, json={"prompt": "x"})
    expect_sentence(reply, status, *words)
    assert reply.headers.get("retry-after") == ("3" if error.retry_after_s else None)


@pytest.mark.parametrize("name", ["x", "Euler", "dpm-adaptive"])
async def test_unsupported_sampler_is_refused_before_the_generation(
    client: httpx.AsyncClient, backend: ToneBackend, name: str
) -> None:
    kwargs = {"sampler_type": name}
    form = {"prompt": "x", "sampler_kwargs": json.dumps(kwargs)}
    times = {"inpaint_start_seconds": "0", "inpaint_end_seconds": "1"}
    replies = [
        *[await client.post(path, json={"prompt": "x", "sampler_kwargs": kwargs}) for path in (URL, "/jobs")],
        *[await client.post(path, data=form, files={"audio": WAV}) for path in (VARIATIONS, "/jobs/variations")],
        await client.post("/jobs/inpaint", data=form | times, files={"audio": WAV}),
    ]
    for reply in replies:
        expect_fields(reply, "sampler_kwargs")
        assert "one of euler, rk4, dpmpp, pingpong for the model small-sfx" in reply.json()["detail"][0]["msg"]
    assert not backend.requests


@pytest.mark.parametrize(
    "error",
    [GenerationError("secret path"), CheckpointError("secret path"), RuntimeError("secret"), KeyError("secret")],
)
async def test_500_is_opaque_and_has_the_request_id(
    client: httpx.AsyncClient, backend: ToneBackend, error: Exception
) -> None:
    backend.error = error
    reply = await client.post(URL, json={"prompt": "x"}, headers={"x-request-id": "abc-1"})
    expect_sentence(reply, 500, "abc-1")
    assert "secret" not in reply.text
    assert "Traceback" not in reply.text


async def test_time_budget_of_the_request_applies(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    backend.delay_s = 30
    expect_sentence(await client.post(URL, json={"prompt": "x", "deadline_s": 0.01}), 504, "deadline_s")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b'{"prompt": "x"', "EOF"), (b'{"prompt": "\\ud800"}', "hex escape"), (b"prompt=x", "line 1")],
)
async def test_broken_json_error_gives_the_reason(client: httpx.AsyncClient, content: bytes, reason: str) -> None:
    reply = await client.post(URL, content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 422
    (fault,) = reply.json()["detail"]
    assert (fault["type"], fault["loc"][0]) == ("json_invalid", "body")
    assert reason in fault["msg"]


async def test_unknown_paths_and_methods_get_json_errors(client: httpx.AsyncClient) -> None:
    expect_sentence(await client.get("/nope"), 404, "Not Found")
    reply = await client.get(URL)
    expect_sentence(reply, 405, "Method Not Allowed")
    assert reply.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("path", "methods", "keys"),
    [
        ("/health", "GET, HEAD", {"detail"}),
        ("/jobs", "GET, POST", {"detail"}),
        ("/jobs/variations", "POST", {"detail"}),
        ("/generate", "POST", {"error", "detail"}),
        ("/generate/loop", "POST", {"error"}),
        ("/v1/models", "GET", {"error"}),
        ("/v1/audio/generate", "POST", {"error"}),
        ("/v1/music", "POST", {"detail"}),
        ("/v2/generate/audio", "GET, POST", {"statusCode", "message", "error", "path", "meta"}),
        ("/queue/fal-ai/stable-audio/requests/x", "GET", {"detail"}),
        ("/fal/fal-ai/stable-audio/requests/x/cancel", "PUT", {"detail"}),
        ("/fal-ai/stable-audio/other", "POST", {"detail"}),
    ],
)
async def test_405_lists_the_methods_of_all_dialects(
    client: httpx.AsyncClient, path: str, methods: str, keys: set[str]
) -> None:
    reply = await client.request("PURGE", path)
    assert (reply.status_code, reply.headers["allow"]) == (405, methods)
    assert set(reply.json()) == keys
    assert "Method Not Allowed" in reply.text


async def test_request_id_is_kept_or_created(client: httpx.AsyncClient) -> None:
    for path in ("/health", "/nope"):
        assert (await client.get(path, headers={"x-request-id": "my.id-1"})).headers["x-request-id"] == "my.id-1"
        assert len((await client.get(path)).headers["x-request-id"]) == 32
    for bad in ("a" * 200, "a b", ""):
        assert len((await client.get("/health", headers={"x-request-id": bad})).headers["x-request-id"]) == 32


async def test_allowed_origins_can_read_headers_of_errors(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    backend.error = RuntimeError("boom")
    for reply in (
        await client.post(URL, json={"prompt": "x"}, headers={"origin": "http://localhost:3000"}),
        await client.get("/health", headers={"origin": "http://localhost:3000"}),
    ):
        assert reply.headers["access-control-allow-origin"] == "http://localhost:3000"
        exposed = {name.strip().lower() for name in reply.headers["access-control-expose-headers"].split(",")}
        assert {"x-model", "x-sample-rate", "x-output-count", "x-seed", "x-seeds", "server-timing"} <= exposed
        assert {"x-request-id", "x-audio-peak", "x-audio-loudness", "x-audio-silent"} <= exposed
        assert {"seed", "finish-reason"} <= exposed  # of Stability's answers


async def test_time_limit_is_a_field_of_the_native_api_only() -> None:
    bodies: dict[str, dict[str, Any]] = {
        URL: {"prompt": "x"},
        "/saos/generate": {"prompt": "x"},
        "/v1/audio/generate": {"input": "x"},
        "/v1/sound-generation": {"text": "x"},
        "/run/fal-ai/stable-audio": {"prompt": "x"},
    }
    async with make_client(run_jobs=False, api={"max_deadline_s": 1e-9}) as (client, backend):
        for path, body in bodies.items():
            reply = await client.post(path, json=body)
            assert "the time budget ran out before the generation started" in reply.text
            assert ("deadline_s" in reply.text) == (path == URL), path
        assert not backend.requests
