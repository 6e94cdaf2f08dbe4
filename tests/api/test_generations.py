from __future__ import annotations

import io
import zipfile

import httpx
import numpy as np
import pytest
import soundfile

from tests.api.compat.serving import make_client
from tests.audio_files import pcm_of
from tests.backends import ToneBackend

URL = "/v1/audio/generations"


@pytest.mark.parametrize("url", [URL, "/generate", "/sa3/v1/audio/generations"])
async def test_single_clip_is_a_wav_with_headers(client: httpx.AsyncClient, url: str) -> None:
    reply = await client.post(url, json={"prompt": "  a tone ", "duration": 1.5, "seed": 7})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "audio/wav"
    assert reply.headers["content-disposition"] == 'attachment; filename="stable-audio-3-small-sfx.wav"'
    assert reply.headers["x-model"] == "small-sfx"
    assert reply.headers["x-sample-rate"] == "44100"
    assert reply.headers["x-output-count"] == "1"
    assert reply.headers["x-seed"] == "7"
    assert "x-seeds" not in reply.headers
    assert int(reply.headers["content-length"]) == len(reply.content)
    audio, rate = soundfile.read(io.BytesIO(reply.content), always_2d=True)
    assert rate == 44100
    assert audio.shape == (66150, 2)
    assert np.abs(np.fft.rfft(audio[:44100, 0])).argmax() == 107


async def test_stages_are_timed(client: httpx.AsyncClient) -> None:
    reply = await client.post(URL, json={"prompt": "x", "duration": 0.1})
    stages = [part.split(";")[0].strip() for part in reply.headers["server-timing"].split(",")]
    assert stages == ["queue", "text", "source", "denoise", "decode", "encode", "total"]


async def test_unset_fields_are_left_to_the_model(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    await client.post(URL, json={"prompt": "x"})
    model, request = backend.requests[0]
    assert model == "small-sfx"
    assert (request.duration_s, request.batch_size, request.steps, request.apg_scale) == (7.0, 1, 8, None)
    assert request.cfg_scale is None
    assert request.duration_padding_s is None
    assert request.chunked_decode is None
    assert request.negative_prompt is None


@pytest.mark.parametrize(("most_s", "budget_s"), [(3600.0, 900), (30.0, 30)])
async def test_request_without_deadline_gets_a_budget(most_s: float, budget_s: int) -> None:
    async with make_client(api={"max_deadline_s": most_s}) as (client, backend):
        await client.post(URL, json={"prompt": "x"})
        assert backend.last.deadline_s == pytest.approx(budget_s, abs=1)


@pytest.mark.parametrize("priority", ["interactive", "batch"])
async def test_request_can_have_batch_priority(client: httpx.AsyncClient, backend: ToneBackend, priority: str) -> None:
    assert (await client.post(URL, json={"prompt": "x", "priority": priority})).status_code == 200
    assert backend.last.priority == priority
    await client.post(URL, json={"prompt": "x"})
    assert backend.last.priority == "interactive"
    refused = await client.post(URL, json={"prompt": "x", "priority": "first"})
    assert refused.status_code == 422
    assert [item["loc"] for item in refused.json()["detail"]] == [["body", "priority"]]


async def test_default_length_is_limited_and_default_steps_are_the_models(
    client: httpx.AsyncClient, backend: ToneBackend
) -> None:
    reply = await client.post(URL, json={"prompt": "x", "model": "demo"})
    assert reply.status_code == 200
    assert (backend.last.duration_s, backend.last.steps) == (5.0, 100)


async def test_every_field_reaches_the_model(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    body = {
        "prompt": " rain ",
        "model": " StabilityAI/stable-audio-3-MEDIUM ",
        "negative_prompt": "hiss",
        "duration": "2.5",
        "steps": 8.0,
        "cfg_scale": True,
        "batch_size": "2",
        "seed": 5,
        "chunked_decode": "true",
        "apg_scale": 0.5,
        "duration_padding_sec": 3,
        "sampler_kwargs": {"sampler_type": "euler", "scale_phi": 0.5, "cfg_norm_threshold": 2, "eta": 1, "x": None},
        "deadline_s": 60,
        "voice": "ignored",
    }
    reply = await client.post(URL, json=body)
    assert reply.status_code == 200, reply.text
    model, request = backend.requests[0]
    assert model == "medium"
    assert (request.prompt, request.negative_prompt, request.duration_s) == ("rain", "hiss", 2.5)
    assert (request.steps, request.cfg_scale, request.batch_size, request.seed) == (8, 1.0, 2, 5)
    assert (request.chunked_decode, request.apg_scale, request.duration_padding_s) == (True, 0.5, 3.0)
    assert (request.sampler, request.cfg_rescale, request.cfg_norm_threshold) == ("euler", 0.5, 2.0)
    assert request.deadline_s == pytest.approx(60, abs=1)
    assert request.request_id == reply.headers["x-request-id"]


async def test_several_variations_are_a_zip(client: httpx.AsyncClient) -> None:
    body = {"prompt": "x", "duration": 0.5, "batch_size": 3, "seed": 10, "model": "medium"}
    reply = await client.post(URL, json=body)
    assert reply.headers["content-type"] == "application/zip"
    assert reply.headers["content-disposition"] == 'attachment; filename="stable-audio-3-medium-batch.zip"'
    assert reply.headers["x-output-count"] == "3"
    assert (reply.headers["x-seed"], reply.headers["x-seeds"]) == ("10", "10, 11, 12")
    with zipfile.ZipFile(io.BytesIO(reply.content)) as archive:
        assert archive.namelist() == [f"stable-audio-3-medium-0{i}.wav" for i in (1, 2, 3)]
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_DEFLATED}
        wavs = [archive.read(name) for name in archive.namelist()]
    alone = [(await client.post(URL, json={**body, "batch_size": 1, "seed": seed})).content for seed in (10, 11, 12)]
    assert wavs == alone
    assert (await client.post(URL, json=body)).content == reply.content


async def test_random_seed_is_reported_and_repeats(client: httpx.AsyncClient) -> None:
    first = await client.post(URL, json={"prompt": "x", "duration": 0.2, "seed": -1})
    second = await client.post(URL, json={"prompt": "x", "duration": 0.2})
    assert first.headers["x-seed"] != second.headers["x-seed"]
    again = await client.post(URL, json={"prompt": "x", "duration": 0.2, "seed": int(first.headers["x-seed"])})
    assert again.content == first.content


@pytest.mark.parametrize("seed", [-2, 2**63, 2**64, 10**30, -(10**30)])
async def test_any_seed_is_accepted_and_repeats(client: httpx.AsyncClient, seed: int) -> None:
    reply = await client.post(URL, json={"prompt": "x", "duration": 0.2, "seed": seed})
    assert reply.status_code == 200
    assert 0 <= int(reply.headers["x-seed"]) < 2**63
    again = await client.post(URL, json={"prompt": "x", "duration": 0.2, "seed": int(reply.headers["x-seed"])})
    assert again.content == reply.content


@pytest.mark.parametrize(
    ("file_format", "media_type"),
    [("flac", "audio/flac"), ("mp3", "audio/mpeg"), ("ogg", "audio/ogg"), ("opus", "audio/ogg")],
)
async def test_other_file_formats(client: httpx.AsyncClient, file_format: str, media_type: str) -> None:
    reply = await client.post(URL, json={"prompt": "x", "duration": 1, "response_format": file_format})
    assert reply.headers["content-type"] == media_type
    assert reply.headers["content-disposition"].endswith(f'small-sfx.{file_format}"')
    assert soundfile.info(io.BytesIO(reply.content)).duration == pytest.approx(1, abs=1e-3)


async def test_long_clip_is_streamed_with_its_length(client: httpx.AsyncClient) -> None:
    async with client.stream("POST", URL, json={"prompt": "x", "duration": 30}) as reply:
        content = await reply.aread()
        assert int(reply.headers["content-length"]) == len(content)
        assert "transfer-encoding" not in reply.headers
        assert len(pcm_of(content)) == 30 * 44100 * 4


@pytest.mark.parametrize("prompt", ["日本語 🎹", "a" * 20_000, "x\x00y", "\u202e rtl", "' OR 1=1 --"])
async def test_any_text_is_a_prompt(client: httpx.AsyncClient, backend: ToneBackend, prompt: str) -> None:
    assert (await client.post(URL, json={"prompt": prompt, "duration": 0.1})).status_code == 200
    assert backend.last.prompt == prompt.strip()


async def test_shortest_clip(client: httpx.AsyncClient) -> None:
    reply = await client.post(URL, json={"prompt": "x", "duration": 1e-9})
    assert reply.status_code == 200
    assert soundfile.info(io.BytesIO(reply.content)).frames <= 1


async def test_json_without_a_content_type(client: httpx.AsyncClient) -> None:
    assert (await client.post(URL, content=b'{"prompt": "x", "duration": 0.1}')).status_code == 200


async def test_a_negative_prompt_has_the_same_limit_as_a_prompt(client: httpx.AsyncClient) -> None:
    """A longer text would keep the text encoder, and so all other clients, busy for seconds."""
    for field in ("prompt", "negative_prompt"):
        reply = await client.post(URL, json={"prompt": "x", field: "q " * 50_001})
        assert reply.status_code == 422
        assert reply.json()["detail"][0]["loc"] == ["body", field]
