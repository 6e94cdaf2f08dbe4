"""Stability AI's REST API over HTTP, as its clients call it."""

from __future__ import annotations

import asyncio
import base64
import io
import re
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
import soundfile

from stable_audio_serve.core.errors import (
    CancelledRequestError,
    GenerationError,
    InvalidRequestError,
    ModelUnavailableError,
    OverloadedError,
)
from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.jobs.runner.runner import JobRunner
from tests.api.compat.serving import make_client, serve_app
from tests.audio_files import make_audio_file
from tests.backends import RATE_HZ, ToneBackend
from tests.parameters import slow
from tests.patience import PATIENCE_S

TEXT, VARY, INPAINT = (f"/v2beta/audio/stable-audio/{kind}" for kind in ("text-to-audio", "audio-to-audio", "inpaint"))
TEXT_2, VARY_2, INPAINT_2 = (path.replace("stable-audio/", "stable-audio-2/") for path in (TEXT, VARY, INPAINT))
RESULTS = "/v2beta/audio/results"
PROMPT = "warm arpeggios on an analog synthesizer"
SOURCE = make_audio_file(duration_s=7, rate_hz=8000, channels=1)
WAV = {"output_format": "wav"}  # for long clips, because MP3 takes seconds
NOTHING = {"none": ""}  # clients pass this to the library `requests`, so that a form without files is multipart


async def post(client: httpx.AsyncClient, path: str, *, source: bytes = SOURCE, **fields: Any) -> httpx.Response:
    """Submit a form whose prompt is `PROMPT`; routes with source audio get `source`. A field that is None is unset."""
    headers = fields.pop("headers", {})
    form = {name: str(value) for name, value in {"prompt": PROMPT, **fields}.items() if value is not None}
    files = NOTHING if path in (TEXT, TEXT_2) else {"audio": ("source.wav", source, "audio/wav")}
    return await client.post(path, data=form, files=files, headers=headers)


async def submit(client: httpx.AsyncClient, path: str, **fields: Any) -> str:
    reply = await post(client, path, **fields)
    assert reply.status_code == 202, reply.text
    assert reply.json().keys() == {"id"}
    return reply.json()["id"]


async def wait(client: httpx.AsyncClient, id: str, **headers: str) -> httpx.Response:
    async with asyncio.timeout(PATIENCE_S):
        while (reply := await client.get(f"{RESULTS}/{id}", headers=headers)).status_code == 202:
            assert reply.json() == {"id": id, "status": "in-progress"}
            await asyncio.sleep(0.02)
    return reply


def faults(reply: httpx.Response, *, status: int = 400, name: str = "bad_request") -> list[str]:
    body = reply.json()
    assert (reply.status_code, body.keys(), body["name"]) == (status, {"id", "name", "errors"}, name), reply.text
    assert body["id"] == reply.headers["x-request-id"]
    return body["errors"]


def test_the_form_is_multipart() -> None:
    request = httpx.Request("POST", "http://x", data={"prompt": "x"}, files=NOTHING)
    assert request.headers["content-type"].startswith("multipart/form-data")


@pytest.mark.parametrize("prefix", ["", "/stability"])
async def test_a_generation_is_accepted_polled_and_downloaded(
    client: httpx.AsyncClient, backend: ToneBackend, runner: JobRunner, prefix: str
) -> None:
    backend.released.clear()
    reply = await client.post(prefix + TEXT, data={"prompt": PROMPT, "seed": "7", "duration": "2"}, files=NOTHING)
    id = reply.json()["id"]
    assert re.fullmatch("[0-9a-f]{64}", id)
    busy = await client.get(f"{prefix}{RESULTS}/{id}")
    assert (busy.status_code, busy.json()) == (202, {"id": id, "status": "in-progress"})
    backend.released.set()
    done = await wait(client, id, Accept="audio/*")
    assert done.status_code == 200
    assert {name: done.headers[name] for name in ("content-type", "seed", "finish-reason")} == {
        "content-type": "audio/mpeg",
        "seed": "7",
        "finish-reason": "SUCCESS",
    }
    assert done.headers["x-request-id"]
    assert int(done.headers["content-length"]) == len(done.content)
    samples, rate_hz = soundfile.read(io.BytesIO(done.content))
    assert (rate_hz, samples.shape[1]) == (RATE_HZ, 2)
    assert abs(len(samples) - 2 * RATE_HZ) < 3000
    assert (await wait(client, id)).content == done.content


@pytest.mark.parametrize("accept", ["application/json", "application/json; type=audio/wav"])
async def test_a_result_can_be_json(client: httpx.AsyncClient, runner: JobRunner, accept: str) -> None:
    id = await submit(client, TEXT, duration=1, output_format="wav", seed=3)
    body = (await wait(client, id, Accept=accept)).json()
    assert body.keys() == {"audio", "seed", "finish_reason"}
    assert (body["seed"], body["finish_reason"]) == (3, "SUCCESS")
    assert base64.b64decode(body["audio"], validate=True) == (await wait(client, id, Accept="audio/wav")).content


@pytest.mark.parametrize("accept", [None, "audio/*", "audio/mpeg", "*/*", "text/html", "audio/*, application/json"])
async def test_other_accept_headers_get_bytes(client: httpx.AsyncClient, accept: str | None) -> None:
    reply = await post(client, TEXT_2, duration=1, headers={} if accept is None else {"Accept": accept})
    assert (reply.status_code, reply.headers["content-type"]) == (200, "audio/mpeg")
    assert reply.headers["finish-reason"] == "SUCCESS"


@pytest.mark.usefixtures("low_rate")
@pytest.mark.parametrize(
    ("path", "fields", "expected"),
    [
        (TEXT, WAV, (120, 8, 1.0)),  # 120 s is the longest clip of the model
        (TEXT, {"duration": 1, "model": "stable-audio-3", "negative_prompt": "noise", "x": "y"}, (1, 8, 1.0)),
        (TEXT, {"duration": 1, "steps": 4, "cfg_scale": 25}, (1, 4, 25.0)),
        (TEXT, {"duration": 5, "steps": 8, "cfg_scale": 1, "model": "demo"}, (5, 8, 1.0)),  # demo's longest clip: 5 s
        (TEXT, {"duration": "1.5"}, (1.5, 8, 1.0)),
        (TEXT_2, {"duration": 1}, (1, 8, 1.0)),
        (TEXT_2, {"duration": 1, "model": "stable-audio-2.5", "steps": 4}, (1, 4, 1.0)),
        (TEXT_2, {"duration": 1, "model": "stable-audio-2"}, (1, 50, 7.0)),
        (TEXT_2, {"duration": 1, "model": "stable-audio-2", "steps": 30, "cfg_scale": 1}, (1, 30, 1.0)),
        (TEXT_2, {"duration": 1, "model": "stable-audio-2", "steps": 100, "cfg_scale": 25}, (1, 100, 25.0)),
        (VARY, WAV, (7, 8, 1.0)),
        (VARY, {"duration": 3}, (3, 8, 1.0)),
        (INPAINT, {"mask_start": 1, **WAV}, (7, 8, 1.0)),
        (VARY_2, WAV, (7, 8, 1.0)),
        (INPAINT_2, {"mask_start": 1, "model": "stable-audio-2", **WAV}, (7, 50, 7.0)),
    ],
)
async def test_defaults_and_ranges(
    client: httpx.AsyncClient,
    backend: ToneBackend,
    runner: JobRunner,
    path: str,
    fields: dict[str, Any],
    expected: tuple[float, int, float],
) -> None:
    reply = await post(client, path, **fields)
    if reply.status_code == 202:
        reply = await wait(client, reply.json()["id"])
    assert reply.status_code == 200, reply.text
    assert (backend.last.duration_s, backend.last.steps, backend.last.cfg_scale) == expected
    is_demo = fields.get("model") == "demo"
    assert (backend.last.prompt, backend.requests[-1][0]) == (PROMPT, "demo" if is_demo else "small-sfx")


@pytest.mark.parametrize(
    ("path", "fields", "field"),
    [
        *((TEXT, {"prompt": value}, "prompt") for value in (None, "", "  ", "x" * 10_001)),
        *((TEXT, {"model": value}, "model") for value in ("stable-audio-2", "stable-audio-9", "x")),
        *((TEXT, {"duration": value}, "duration") for value in (0, 0.9, 381, 121, "x", "nan", -1)),
        *((TEXT, {"seed": value}, "seed") for value in (-1, 4294967295, 1.5, "x")),
        *((TEXT, {"steps": value}, "steps") for value in (3, 9, 0, 4.5)),
        *((TEXT, {"cfg_scale": value}, "cfg_scale") for value in (0.9, 25.1, 0, "inf")),
        *((TEXT, {"output_format": value}, "output_format") for value in ("flac", "ogg", "MP3")),
        *((VARY, {"strength": value}, "strength") for value in (-0.1, 1.1, "x")),
        *((INPAINT, {"mask_start": value}, "mask_start") for value in (None, -1, 7, 381)),
        *((INPAINT, {"mask_start": 3, "mask_end": value}, "mask_end") for value in (-1, 381, "x")),
        (INPAINT, {"mask_start": 3, "mask_end": 2}, "mask_start"),
        (TEXT_2, {"model": "stable-audio-3"}, "model"),
        (TEXT_2, {"model": "stable-audio-2", "steps": 29}, "steps"),
        (TEXT_2, {"model": "stable-audio-2", "steps": 101}, "steps"),
        (TEXT_2, {"steps": 9}, "steps"),
        (TEXT_2, {"duration": 191}, "duration"),
        (VARY_2, {"strength": 0.005}, "strength"),
    ],
)
async def test_wrong_values_are_400_by_name(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], field: str
) -> None:
    (fault,) = faults(await post(client, path, **fields))
    assert fault.startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("path", "fields", "bounds"),
    [
        *(
            (path, {"duration": value}, "1 to 120 for the model small-sfx")
            for path in (TEXT, TEXT_2)
            for value in (0.5, 200, 381)
        ),
        *((TEXT, {"model": "medium", "duration": value}, "1 to 380 for the model medium") for value in (0.5, 381)),
        *((TEXT_2, {"model": "medium", "duration": value}, "1 to 190 for the model medium") for value in (0.5, 381)),
        *((path, {"steps": value}, "4 to 8") for path in (TEXT, TEXT_2) for value in (3, 9, 101)),
        *((TEXT_2, {"model": "stable-audio-2", "steps": value}, "30 to 100") for value in (3, 29, 101)),
        *((path, {"strength": 1.1}, bounds) for path, bounds in ((VARY, "0 to 1"), (VARY_2, "0.01 to 1"))),
        (VARY_2, {"strength": -0.1}, "0.01 to 1"),
        (VARY_2, {"model": "stable-audio-2", "strength": -0.1}, "0 to 1"),
    ],
)
async def test_refusals_name_the_bounds_that_apply(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], bounds: str
) -> None:
    assert faults(await post(client, path, **fields)) == [f"{[*fields][-1]}: must be from {bounds}"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (make_audio_file(duration_s=5.9, rate_hz=8000), "must last from 6 to 380 seconds, not 5.90"),
        (make_audio_file(duration_s=381, rate_hz=8000, channels=1), "must last from 6 to 380 seconds, not 381.00"),
        (b"", "is empty"),
        (b"not audio", ""),
    ],
)
async def test_unusable_source_audio_is_refused(client: httpx.AsyncClient, source: bytes, message: str) -> None:
    (fault,) = faults(await post(client, VARY, source=source))
    assert fault.startswith("audio: ")
    assert message in fault


@pytest.mark.parametrize("path", [TEXT, VARY, INPAINT, TEXT_2])
@pytest.mark.parametrize("kind", ["application/json", "Text/Plain; charset=utf-8"])
async def test_bodies_that_are_no_forms_are_refused(client: httpx.AsyncClient, path: str, kind: str) -> None:
    reply = await client.post(path, content=b'{"prompt": "x"}', headers={"Content-Type": kind})
    assert faults(reply) == [f"content-type: must be multipart/form-data, not {kind.lower().partition(';')[0]}"]


async def test_text_needs_no_multipart_form(client: httpx.AsyncClient) -> None:
    assert (await client.post(TEXT, data={"prompt": "x", "duration": "1"})).status_code == 202
    for form in ({}, {"duration": "1"}):
        assert faults(await client.post(TEXT, data=form)) == ["prompt: Field required"]


@pytest.mark.parametrize("path", [VARY, INPAINT, VARY_2, INPAINT_2])
async def test_source_audio_is_required(client: httpx.AsyncClient, path: str) -> None:
    assert faults(await client.post(path, data={"prompt": "x"}, files=NOTHING)) == ["audio: Field required"]
    text = {"prompt": "x", "audio": "a.wav"}
    assert faults(await client.post(path, data=text, files=NOTHING)) == ["audio: must be an uploaded file"]


async def test_variation_and_region_reach_the_model(
    client: httpx.AsyncClient, backend: ToneBackend, runner: JobRunner
) -> None:
    for path in (VARY, VARY_2):
        reply = await post(client, path, strength=0.4, **WAV)
        assert (await wait(client, reply.json()["id"]) if path == VARY else reply).status_code == 200
        assert backend.last.init_noise_level == 0.4
        assert backend.last.init_audio is not None
        assert backend.last.init_audio.duration_s == 7
    for path in (INPAINT, INPAINT_2):
        reply = await post(client, path, mask_start=1.5, mask_end=190, **WAV)
        assert (await wait(client, reply.json()["id"]) if path == INPAINT else reply).status_code == 200
        assert backend.last.inpaint_regions_s == ((1.5, 7.0),)
        assert backend.last.inpaint_audio is not None
        assert backend.last.keep == "source"


async def test_random_seeds_differ_and_are_reported(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    replies = [await post(client, TEXT_2, duration=1, seed=seed) for seed in (0, 0, 4_294_967_294)]
    seeds = [int(reply.headers["seed"]) for reply in replies]
    assert len({*seeds}) == 3
    assert all(1 <= seed <= 4_294_967_294 for seed in seeds)
    assert [request.seed for _, request in backend.requests] == seeds


async def test_a_synchronous_answer_can_be_json(client: httpx.AsyncClient) -> None:
    fields = {"duration": 1, "seed": 5, "output_format": "wav", "model": "stable-audio-2.5"}
    reply = await post(client, TEXT_2, headers={"Accept": "application/json"}, **fields)
    body = reply.json()
    assert (body["seed"], body["finish_reason"]) == (5, "SUCCESS")
    assert base64.b64decode(body["audio"]) == (await post(client, TEXT_2, **fields)).content
    for headers in ({}, {"Accept": "application/json"}, {"Origin": "http://localhost:3000"}):
        reply = await post(client, TEXT_2, headers=headers, **fields)
        assert reply.headers["vary"] == "Accept, Origin"  # so that caches tell the answers apart


async def test_an_unknown_id_is_404(client: httpx.AsyncClient) -> None:
    for id in ("0" * 64, "x", "%00"):
        assert faults(await client.get(f"{RESULTS}/{id}"), status=404, name="not_found") == ["id: no such generation"]


async def test_a_failed_generation_has_its_error(
    client: httpx.AsyncClient, backend: ToneBackend, runner: JobRunner
) -> None:
    backend.error = GenerationError("the model produced silence")
    reply = await wait(client, await submit(client, TEXT, duration=1))
    assert faults(reply, status=500, name="internal_error") == ["the model produced silence"]


@pytest.mark.parametrize(
    ("error", "status", "name"),
    [
        (OverloadedError("full", retry_after_s=3), 429, "rate_limit_exceeded"),
        (ModelUnavailableError("the model is away", retry_after_s=3), 503, "service_unavailable"),
        (CancelledRequestError("the request was cancelled", retry_after_s=3), 503, "service_unavailable"),
    ],
)
async def test_refusals_say_when_to_retry(
    client: httpx.AsyncClient, backend: ToneBackend, error: Exception, status: int, name: str
) -> None:
    backend.error = error
    reply = await post(client, TEXT_2, duration=1)
    assert faults(reply, status=status, name=name) == [str(error)]
    assert reply.headers["retry-after"] == "3"


async def test_a_served_model_and_the_setting_choose_the_model() -> None:
    async with make_client(dialects={"stability_model": "medium"}, models=MODELS) as (client, backend):
        for fields, model in (({}, "medium"), ({"model": "small-sfx"}, "small-sfx")):
            await post(client, TEXT_2, duration=1, **fields)
            assert backend.requests[-1][0] == model


MODELS = [{"name": "small-sfx"}, {"name": "medium"}]


def with_keys(folder: Path) -> AbstractAsyncContextManager[tuple[httpx.AsyncClient, ToneBackend]]:
    lines = [f"first:{hash_key('first')}", f"second:{hash_key('second')} audio-seconds-per-minute=20"]
    (folder / "keys").write_text("\n".join(lines))
    return make_client(api={"key_file": str(folder / "keys")})


async def test_keys_are_sent_in_three_headers_or_without_bearer(tmp_path: Path) -> None:
    async with with_keys(tmp_path) as (client, _):
        sent = [{"Authorization": value} for value in ("first", "Bearer first", "Key first", " first ")]
        for header in (*sent, {"xi-api-key": "first"}, {"Authorization": "", "xi-api-key": "first"}):
            assert (await post(client, TEXT, duration=1, headers=header)).status_code == 202
            assert (await client.get("/v1/user/account", headers=header)).status_code == 200
        for header in ({}, {"Authorization": "wrong"}, {"Authorization": "Basic first"}):
            for reply in (
                await post(client, TEXT, headers=header),
                await client.get("/v1/user/balance", headers=header),
            ):
                assert faults(reply, status=401, name="unauthorized")
        assert (await client.get("/jobs", headers={"Authorization": "first"})).status_code == 401


async def test_the_balance_is_what_the_key_may_still_have(tmp_path: Path) -> None:
    async with with_keys(tmp_path) as (client, _):
        first, second = {"Authorization": "Bearer first"}, {"Authorization": "Bearer second"}
        assert (await client.get("/v1/user/balance", headers=first)).json() == {"credits": 1_000_000}
        assert (await client.get("/v1/user/balance", headers=second)).json() == {"credits": 20}
        assert (await post(client, TEXT_2, duration=12, headers=second, **WAV)).status_code == 200
        assert (await client.get("/v1/user/balance", headers=second)).json() == {"credits": 8}
        refused = await post(client, TEXT, duration=12, headers=second)
        assert faults(refused, status=429, name="rate_limit_exceeded")
        assert int(refused.headers["retry-after"]) > 0
        account = (await client.get("/v1/user/account", headers=second)).json()
        assert account.keys() == {"id", "email", "organizations", "profile_picture"}


async def test_without_keys_the_balance_has_no_limit(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/user/balance")).json() == {"credits": 1_000_000}
    account = (await client.get("/stability/v1/user/account")).json()
    assert account["id"] == "anybody"  # no keys are configured


@pytest.mark.server
@pytest.mark.parametrize("accept", ["audio/*", slow("application/json")])
async def test_curl_gets_a_clip(accept: str) -> None:
    async with serve_app() as (port, _):
        base = f"http://127.0.0.1:{port}/v2beta/audio"
        command = ["curl", "-sS", "-f", f"{base}/stable-audio-2/text-to-audio", "-H", "authorization: Bearer sk-x"]
        command += ["-H", f"accept: {accept}", "-F", f"prompt={PROMPT}", "-F", "duration=1", "-F", "output_format=wav"]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        output, _ = await process.communicate()
    assert process.returncode == 0
    assert output.startswith(b"RIFF" if accept == "audio/*" else b'{"audio":"UklGR')


@pytest.mark.parametrize(
    ("field", "message", "sentence"),
    [
        ("duration", "a clip of 9 s takes 4 GB", "duration: a clip of 9 s takes 4 GB"),
        ("init_noise_level", "init_noise_level must be low", "strength must be low"),
        ("inpaint_start_seconds", "no region", "mask_start: no region"),
    ],
)
async def test_refusals_by_the_model_name_the_field(
    client: httpx.AsyncClient, backend: ToneBackend, runner: JobRunner, *, field: str, message: str, sentence: str
) -> None:
    backend.error = InvalidRequestError(message, field=field)
    assert faults(await post(client, VARY_2)) == [sentence]
    assert faults(await wait(client, await submit(client, VARY))) == [sentence]
