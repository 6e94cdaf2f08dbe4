"""Request fields that have no effect: the native API lists them in its response, or refuses the request."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from stable_audio_serve.jobs.runner.runner import JobRunner
from tests.api.compat.serving import make_client
from tests.api.test_jobs import submit, wait
from tests.audio_files import make_audio_file
from tests.backends import ToneBackend

AUDIO = "/v1/audio/generations"
FORMS = {"vary": "/v1/audio/variations", "inpaint": "/v1/audio/inpaint", "later": "/jobs/variations"}
REGION = {"inpaint_start_seconds": "0", "inpaint_end_seconds": "1"}


def warned(*names: str) -> str:
    return f'299 - "unknown fields are ignored: {", ".join(names)}"'


async def test_unknown_json_fields_are_named(client: httpx.AsyncClient) -> None:
    body = {
        "prompt": "rain",
        "lenght": 3,
        "webhook_url": "https://a.example",
        "sampler_kwargs": {"eta": 1, "rho": None},
    }
    reply = await client.post(f"{AUDIO}?sede=1", json=body)
    assert reply.status_code == 200
    assert reply.headers["warning"] == warned("lenght", "webhook_url", "sampler_kwargs.eta", "sede")
    ticket = (await client.post("/jobs", json=body)).json()
    assert ticket["ignored"] == ["lenght", "sampler_kwargs.eta"]
    page = await client.get("/jobs", params={"limt": 1, "limit": 1})
    assert page.json()["ignored"] == ["limt"]
    merged = await client.post("/generate", json={**body, "return_format": "base64"})
    assert merged.headers["warning"] == warned("lenght", "webhook_url", "sampler_kwargs.eta")


@pytest.mark.parametrize("kind", FORMS)
async def test_unknown_form_fields_are_named(client: httpx.AsyncClient, kind: str) -> None:
    form = {"prompt": "rain", "duration": "1", "lenght": "3", **(REGION if kind == "inpaint" else {})}
    reply = await client.post(FORMS[kind], data=form, files={"audio": make_audio_file(), "mask": b"x"})
    assert reply.is_success, reply.text
    if kind == "later":
        assert reply.json()["ignored"] == ["lenght", "mask"]
    else:
        assert reply.headers["warning"] == warned("lenght", "mask")


async def test_response_without_warnings_has_no_header(client: httpx.AsyncClient, runner: JobRunner) -> None:
    assert "warning" not in (await client.post(AUDIO, json={"prompt": "rain", "duration": 1})).headers
    job = await wait(client, await submit(client, prompt="rain"))
    assert job["warnings"] == []
    assert "warning" not in (await client.get(job["download_url"])).headers
    assert (await client.get(job["download_url"], params={"x": 1})).headers["warning"] == warned("x")


async def test_hostile_names_cannot_break_the_header(client: httpx.AsyncClient) -> None:
    names = ['a"b\\', "x\r\nevil: 1", "雨", "y" * 5000, *(f"n{number}" for number in range(500))]
    reply = await client.post(AUDIO, json={"prompt": "rain", "duration": 1, **dict.fromkeys(names, 1)})
    assert reply.status_code == 200
    assert "evil" not in reply.headers
    assert len(reply.headers["warning"]) < 1000
    assert reply.headers["warning"].isprintable()
    assert reply.headers["warning"].startswith(r'299 - "unknown fields are ignored: a\"b\\, x??evil: 1, \\u96e8, yyy')


@pytest.mark.parametrize("query", ["", "?sede=1"])
async def test_unknown_fields_are_refused_if_configured(query: str) -> None:
    async with make_client(api={"unknown_fields": "refuse"}) as (client, backend):
        body: dict[str, Any] = {"prompt": "rain"} if query else {"prompt": "rain", "lenght": 3}
        for path in (AUDIO, "/jobs"):
            reply = await client.post(f"{path}{query}", json=body)
            (fault,) = reply.json()["detail"]
            assert (reply.status_code, fault["loc"]) == (422, ["query", "sede"] if query else ["body", "lenght"])
        assert (await client.get(f"/jobs{query}")).status_code == (422 if query else 200)
        assert backend.requests == []
        assert (await client.post(AUDIO, json={"prompt": "rain", "duration": 1})).status_code == 200


async def test_unread_end_of_a_prompt_is_named() -> None:
    sentence = "prompt: the model reads the first 1012 characters only"
    async with make_client(ToneBackend(prompt_chars=1012)) as (client, _):
        reply = await client.post(AUDIO, json={"prompt": "x" * 10_400, "duration": 1, "lenght": 3})
        assert reply.headers["warning"] == f'{warned("lenght")}, 299 - "{sentence}"'
        short = await client.post(AUDIO, json={"prompt": "x" * 1012, "duration": 1})
        assert "warning" not in short.headers
        recipe = json.loads(reply.headers["x-recipe"])
        assert recipe["left_out"] == ["prompt"]
        assert "prompt" not in recipe
        assert json.loads(short.headers["x-recipe"])["prompt"] == "x" * 1012
