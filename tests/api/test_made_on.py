"""The headers of every audio file name the device that generated the audio. The native API's JSON names it too."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import httpx
import pytest

from stable_audio_serve.core.generation import DeviceUse
from stable_audio_serve.jobs.runner.runner import JobRunner
from tests.api.compat.test_aiml import poll_until
from tests.api.compat.test_aiml import submit as submit_aiml
from tests.api.test_jobs import submit, wait
from tests.backends import ToneBackend

BODY = {"prompt": "x", "duration": 1, "seed": 300}
MADE_ON = ("cuda", "float16")


@pytest.fixture(autouse=True)
def on_a_gpu(backend: ToneBackend) -> None:
    backend.device = DeviceUse("cuda", 1_000_000_000, 2_000_000_000, "float16")


def device_headers(reply: httpx.Response) -> tuple[str, str]:
    return reply.headers["x-device"], reply.headers["x-dtype"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/audio/generations", BODY),
        ("/v1/audio/generations", BODY | {"batch_size": 2}),
        ("/saos/generate", {"prompt": "x", "seconds_total": 1}),
        ("/saos/generate", {"prompt": "x", "seconds_total": 1, "return_format": "base64"}),
        ("/v1/audio/generate", {"input": "x", "audio_length": 1}),
        ("/v1/sound-generation", {"text": "x", "duration_seconds": 1}),
    ],
)
async def test_synchronous_response_has_device_headers(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    assert device_headers(await client.post(path, json=body)) == MADE_ON


async def test_files_of_queued_dialects_have_device_headers(client: httpx.AsyncClient, runner: JobRunner) -> None:
    fal = await client.post("/fal-ai/stable-audio", json={"prompt": "x", "seconds_total": 1})
    aiml = await poll_until(client, await submit_aiml(client, seconds_total=1), "completed")
    for body in (fal.json(), aiml):
        assert device_headers(await client.get(body["audio_file"]["url"])) == MADE_ON
        assert not {"device", "dtype"} & (body.keys() | body["audio_file"].keys())


async def test_succeeded_job_has_the_device(client: httpx.AsyncClient, backend: ToneBackend, runner: JobRunner) -> None:
    backend.released.clear()
    ticket = await submit(client, **BODY)
    waiting = (await client.get(f"/jobs/{ticket['id']}")).json()
    assert (waiting["device"], waiting["dtype"]) == (None, None)
    backend.released.set()
    job = await wait(client, ticket)
    assert (job["device"], job["dtype"]) == MADE_ON
    assert device_headers(await client.get(job["download_url"])) == MADE_ON


async def test_manifest_has_the_device(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/audio/generations", json=BODY | {"batch_size": 2, "manifest": True})
    manifest = json.loads(zipfile.ZipFile(io.BytesIO(reply.content)).read("manifest.json"))
    assert (manifest["device"], manifest["dtype"]) == MADE_ON
