"""vLLM-Omni's `POST /v1/audio/generate`: documented fields, defaults, spans and formats."""

from __future__ import annotations

import io
import wave
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.catalog import ModelCard, ModelCatalog
from stable_audio_serve.core.settings import Settings
from tests.backends import RATE_HZ, ToneBackend, make_catalog

URL = "/v1/audio/generate"
WINDOW_S = 1024 * 2048 / RATE_HZ


async def generate(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    reply = await client.post(URL, json={"input": "rain", **fields})
    assert reply.status_code == 200, reply.text
    return reply


def read_wav(data: bytes) -> npt.NDArray[np.int16]:
    """Returns the samples (samples, channels) of a 44.1 kHz stereo WAV file with 16 bits per sample."""
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE_HZ, 2, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, 2)


def measure_pitch(tone: npt.NDArray[Any]) -> float:
    size = 2**18
    tone = tone[:size].astype(np.float64)
    return float(np.abs(np.fft.rfft(tone * np.hanning(len(tone)), size)).argmax()) * RATE_HZ / size


async def test_unset_fields_have_the_documented_defaults(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    reply = await generate(client)
    assert reply.headers["content-type"] == "audio/wav"
    assert len(read_wav(reply.content)) == 1024 * 2048
    model, request = backend.requests[-1]
    assert model == "small-sfx"
    assert request.prompt == "rain"
    assert request.duration_s == WINDOW_S
    assert (request.steps, request.cfg_scale, request.negative_prompt) == (50, 7.0, None)
    assert (request.batch_size, request.start_s) == (1, 0.0)


async def test_null_means_the_default_for_optional_fields(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    names = (
        "model",
        "speed",
        "stream_format",
        "audio_start",
        "negative_prompt",
        "guidance_scale",
        "num_inference_steps",
        "seed",
    )
    await generate(client, audio_length=1)
    plain = replace(backend.last, seed=0, request_id="", deadline_s=None)
    await generate(client, audio_length=1, **dict.fromkeys(names))
    assert replace(backend.last, seed=0, request_id="", deadline_s=None) == plain
    for name in ("input", "response_format"):
        assert (await client.post(URL, json={"input": "x", name: None})).status_code == 400


async def test_fields_of_the_example_client(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    reply = await generate(
        client,
        audio_length=10.0,
        audio_start=0.0,
        response_format="wav",
        negative_prompt="Low quality",
        guidance_scale=7.0,
        num_inference_steps=100,
        seed=42,
    )
    assert len(read_wav(reply.content)) == 10 * RATE_HZ
    request = backend.last
    assert (request.negative_prompt, request.cfg_scale, request.steps) == ("Low quality", 7.0, 100)
    assert (request.seed, request.duration_s) == (42, 10.0)


@pytest.mark.parametrize("fields", [{"num_inference_steps": 150, "audio_length": 15}, {"num_inference_steps": 1000}])
async def test_step_limit_of_the_native_api_does_not_apply(client: httpx.AsyncClient, fields: Any) -> None:
    await generate(client, audio_length=1, num_inference_steps=fields["num_inference_steps"])


@pytest.mark.parametrize(("guidance", "used"), [(0, 1.0), (0.5, 1.0), (1, 1.0), (1.5, 1.5), (1000, 1000.0)])
async def test_guidance_is_enabled_above_one(
    client: httpx.AsyncClient, backend: ToneBackend, guidance: float, used: float
) -> None:
    await generate(client, audio_length=1, guidance_scale=guidance)
    assert backend.last.cfg_scale == used


async def test_empty_negative_prompt_means_none(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    await generate(client, audio_length=1, negative_prompt="")
    assert backend.last.negative_prompt is None


@pytest.mark.parametrize("seed", [0, 1, -1, -7, 2**63 - 1, -(2**63)])
async def test_seed_repeats_the_bytes(client: httpx.AsyncClient, backend: ToneBackend, seed: int) -> None:
    replies = [await generate(client, audio_length=0.5, seed=seed) for _ in range(2)]
    assert replies[0].content == replies[1].content
    assert backend.requests[-1][1].seed == backend.requests[-2][1].seed
    assert 0 <= backend.last.seed < 2**63


async def test_clips_without_a_seed_differ(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    for _ in range(5):
        await generate(client, audio_length=0.1)
    assert len({request.seed for _, request in backend.requests}) == 5


@pytest.mark.parametrize("name", ["medium", "stable-audio-3-medium", "stabilityai/stable-audio-3-medium"])
async def test_model_is_selected_by_any_served_name(client: httpx.AsyncClient, backend: ToneBackend, name: str) -> None:
    reply = await generate(client, audio_length=0.1, model=name)
    assert backend.requests[-1][0] == reply.headers["x-model"] == "medium"


async def test_configured_default_model_is_used(backend: ToneBackend) -> None:
    settings = Settings.model_validate({"dialects": {"model": "stable-audio-3-medium"}})
    transport = httpx.ASGITransport(create_app(backend, settings))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as own:
        await generate(own, audio_length=0.1)
    assert backend.requests[-1][0] == "medium"


async def test_unknown_fields_are_ignored(client: httpx.AsyncClient) -> None:
    await generate(client, audio_length=0.1, voice="alloy", instructions="loud", prompt=5, batch_size=9, steps=-1)


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
async def test_every_json_content_type_is_accepted(client: httpx.AsyncClient, content_type: str) -> None:
    body = '{"input": "Regen über Zürich 🌧", "audio_length": 0.1}'.encode()
    reply = await client.post(URL, content=body, headers={"content-type": content_type})
    assert reply.status_code == 200


async def test_route_exists_below_its_prefix(client: httpx.AsyncClient) -> None:
    assert (await client.post(f"/vllm{URL}", json={"input": "x", "audio_length": 0.1})).status_code == 200


# The returned clip is the part of the generated audio from sample int(start * rate) to int(end * rate).


@pytest.mark.parametrize(
    ("fields", "first", "last"),
    [
        ({"audio_length": 3}, 0, 3 * RATE_HZ),
        ({"audio_length": 0.3333}, 0, int(0.3333 * RATE_HZ)),
        ({"audio_length": 2, "audio_start": 1.5}, int(1.5 * RATE_HZ), int(3.5 * RATE_HZ)),
        ({"audio_length": 2, "audio_start": None}, 0, 2 * RATE_HZ),
        # Without `audio_length`, `audio_start` is ignored.
        *(({"model": "demo", "audio_start": value}, 0, 5 * RATE_HZ) for value in (2, -5)),
        # The clip would end at 6 s, but the model's longest clip ends at 5 s.
        ({"model": "demo", "audio_length": 4, "audio_start": 2}, 2 * RATE_HZ, 5 * RATE_HZ),
        ({"model": "demo", "audio_length": 5}, 0, 5 * RATE_HZ),
        ({"audio_length": 1e-9}, 0, 1),
    ],
)
async def test_clip_is_the_requested_span(
    client: httpx.AsyncClient, backend: ToneBackend, fields: dict[str, Any], first: int, last: int
) -> None:
    audio = read_wav((await generate(client, seed=5, **fields)).content)
    assert len(audio) == last - first
    whole = read_wav(
        (await generate(client, seed=5, **fields | {"audio_start": 0, "audio_length": last / RATE_HZ})).content
    )
    np.testing.assert_array_equal(audio, whole[first:])


async def test_model_conditioned_on_start_gets_the_span() -> None:
    card = ModelCard("open", "stable-audio-open", max_duration_s=WINDOW_S, conditions_on_start=True)
    backend = ToneBackend(catalog=ModelCatalog([card]))
    transport = httpx.ASGITransport(create_app(backend, Settings()))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        audio = read_wav((await generate(client, audio_length=5, audio_start=10)).content)
        assert len(audio) == 5 * RATE_HZ
        request = backend.last
        assert (request.start_s, request.conditioned_total_s, request.duration_s) == (10.0, 15.0, 15.0)
        shortened = read_wav((await generate(client, audio_length=20, audio_start=40)).content)
        assert len(shortened) == pytest.approx((WINDOW_S - 40) * RATE_HZ, abs=1)
        request = backend.last
        assert (request.start_s, request.conditioned_total_s, request.duration_s) == (40.0, 60.0, WINDOW_S)
        await generate(client)
        assert (backend.last.start_s, backend.last.duration_s) == (0.0, WINDOW_S)


async def test_lengths_are_limited_by_the_model_only(backend: ToneBackend) -> None:
    settings = Settings.model_validate({"api": {"max_duration_s": 3, "max_steps": 10}})
    transport = httpx.ASGITransport(create_app(backend, settings))
    assert make_catalog().resolve("demo").max_duration_s == 5
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as own:
        assert len(read_wav((await generate(own, model="demo")).content)) == 5 * RATE_HZ
        assert len(read_wav((await generate(own, audio_length=4, num_inference_steps=150)).content)) == 4 * RATE_HZ
        refused = await own.post(URL, json={"input": "x", "model": "demo", "audio_length": 5.1})
        assert refused.status_code == 400


@pytest.mark.parametrize("speed", [0.25, 0.9, 1, 1.3, 4])
async def test_speed_changes_the_length_and_keeps_the_pitch(client: httpx.AsyncClient, speed: float) -> None:
    audio = read_wav((await generate(client, audio_length=2, seed=300, speed=speed)).content)
    assert len(audio) == round(2 * RATE_HZ / speed)
    assert measure_pitch(audio[:, 0]) == pytest.approx(400, rel=0.005)


async def test_speed_applies_to_the_span_in_every_format(client: httpx.AsyncClient) -> None:
    pcm = await generate(client, audio_length=1, audio_start=1, speed=2, response_format="pcm")
    assert len(pcm.content) == 4 * round(RATE_HZ / 2)


@pytest.mark.parametrize(
    ("name", "media_type", "container", "subtype", "rate_hz"),
    [
        ("wav", "audio/wav", "WAV", "PCM_16", 44100),
        ("flac", "audio/flac", "FLAC", "PCM_16", 44100),
        ("mp3", "audio/mpeg", "MP3", "MPEG_LAYER_III", 44100),
        ("opus", "audio/ogg", "OGG", "OPUS", 48000),
    ],
)
async def test_every_format_is_encoded_as_documented(
    client: httpx.AsyncClient, name: str, media_type: str, container: str, subtype: str, rate_hz: int
) -> None:
    reply = await generate(client, audio_length=2, seed=340, response_format=name)
    assert reply.headers["content-type"] == media_type
    assert int(reply.headers["content-length"]) == len(reply.content)
    with soundfile.SoundFile(io.BytesIO(reply.content)) as file:
        assert (file.format, file.subtype, file.samplerate, file.channels) == (container, subtype, rate_hz, 2)
        audio = file.read(dtype="float32")
    assert len(audio) == 2 * rate_hz
    assert measure_pitch(audio[:, 0]) * rate_hz / RATE_HZ == pytest.approx(440, rel=0.002)
    again = await generate(client, audio_length=2, seed=340, response_format=name)
    assert again.content == reply.content


async def test_pcm_is_the_wav_without_its_header(client: httpx.AsyncClient) -> None:
    pcm = await generate(client, audio_length=1, seed=1, response_format="pcm")
    file = await generate(client, audio_length=1, seed=1)
    assert pcm.headers["content-type"] == "audio/pcm"
    assert pcm.headers["x-sample-rate"] == "44100"
    np.testing.assert_array_equal(np.frombuffer(pcm.content, "<i2").reshape(-1, 2), read_wav(file.content))


@pytest.mark.parametrize("name", ["wav", "pcm", "flac", "mp3", "opus"])
async def test_shortest_clip_is_a_file_in_every_format(client: httpx.AsyncClient, name: str) -> None:
    reply = await generate(client, audio_length=1e-9, speed=4, response_format=name)
    assert reply.content
