"""`POST /generate` and style transfer in the Stable Audio Open Small dialect."""

from __future__ import annotations

import time
from typing import Any

import httpx
import numpy as np
import pytest

from stable_audio_serve.api.compat.stable_audio_open_small import windowed_model
from stable_audio_serve.core.catalog import ModelCard, ModelCatalog
from stable_audio_serve.core.generation import DeviceUse
from tests.api.compat.saos import (
    CLIP_KEYS,
    STYLE_KEYS,
    WINDOW_SAMPLES,
    expect_base64,
    expect_refusal,
    expect_wav,
)
from tests.api.compat.serving import make_client
from tests.audio_files import make_audio_file
from tests.backends import ToneBackend

pytestmark = pytest.mark.server

PATHS = ("/generate", "/saos/generate")
STYLE = "/generate/style-transfer"


@pytest.mark.parametrize("path", PATHS)
async def test_documented_request_returns_a_file(client: httpx.AsyncClient, backend: ToneBackend, path: str) -> None:
    body = {"prompt": "lo-fi hip-hop beat with pianos 90bpm", "steps": 8, "cfg_scale": 1.0, "seed": 12345}
    before = int(time.time())
    reply = await client.post(path, json=body)
    pcm = expect_wav(reply, name=r"stable_audio_12345_\d{10}\.wav")
    stamp = int(reply.headers["content-disposition"].split("_")[-1].split(".")[0])
    assert before <= stamp <= time.time()
    assert len(pcm) == WINDOW_SAMPLES
    model, request = backend.requests[0]
    assert (model, reply.headers["x-model"]) == ("small-sfx", "small-sfx")
    assert (request.prompt, request.steps, request.cfg_scale, request.seed) == (body["prompt"], 8, 1.0, 12345)
    assert (request.init_audio, request.sampler, request.start_s, request.batch_size) == (None, None, 0.0, 1)
    assert request.conditioned_total_s == 12.0  # the window of 11.89 s, rounded up


async def test_unset_fields_have_the_documented_defaults(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    _, metadata = expect_base64(await client.post("/generate", json={"prompt": "x", "return_format": "base64"}))
    assert set(metadata) == CLIP_KEYS
    assert (metadata["steps"], metadata["cfg_scale"], metadata["negative_prompt"]) == (8, 1.0, None)
    assert metadata["duration_seconds"] == 11.89
    assert metadata["detected_bpm"] is None
    assert metadata["device"] == "cpu"
    assert backend.last.seed == metadata["seed"]
    assert 0 <= metadata["seed"] < 2**32


@pytest.mark.parametrize(("objective_steps", "steps"), [(8, 8), (50, 50), (100, 100), (400, 250)])
async def test_default_steps_are_the_models(objective_steps: int, steps: int) -> None:
    catalog = ModelCatalog([ModelCard("engine", "x", default_steps=objective_steps)])
    async with make_client(ToneBackend(catalog)) as (client, backend):
        for sent in ({}, {"steps": None}):
            assert (await client.post("/generate", json={"prompt": "x", **sent})).status_code == 200
            assert backend.last.steps == steps


async def test_every_field_reaches_the_model_and_the_metadata() -> None:
    catalog = ModelCatalog([ModelCard("engine", "x", conditions_on_start=True)])
    body = {
        "prompt": "dark pad 80 BPM",
        "negative_prompt": "hiss",
        "steps": 250,
        "cfg_scale": 20,
        "seed": 7,
        "return_format": "base64",
        "seconds_total": 5,
        "seconds_start": 2.5,
        "sampler_type": " pingpong ",
        "model_type": "standard",
        "finetune_repo": None,
        "finetune_checkpoint": None,
        "unknown": [1],
    }
    async with make_client(ToneBackend(catalog)) as (client, backend):
        pcm, metadata = expect_base64(await client.post("/generate", json=body))
    request = backend.last
    assert len(pcm) == 5 * 44_100
    assert (request.duration_s, request.start_s, request.sampler) == (5, 2.5, "pingpong")
    assert (request.negative_prompt, request.steps, request.cfg_scale) == ("hiss", 250, 20)
    expected = {key: body[key] for key in ("prompt", "negative_prompt", "steps", "cfg_scale", "seed")}
    assert expected.items() <= metadata.items()
    assert (metadata["detected_bpm"], metadata["sample_rate"], metadata["duration_seconds"]) == (80, 44_100, 5)
    assert metadata["generation_time"] >= 0
    assert metadata["realtime_factor"] > 0


async def test_start_is_ignored_by_models_without_that_condition(
    client: httpx.AsyncClient, backend: ToneBackend
) -> None:
    assert (await client.post("/generate", json={"prompt": "x", "seconds_start": 3})).status_code == 200
    assert backend.last.start_s == 0.0


@pytest.mark.parametrize(
    ("seconds", "samples"),
    [
        (1, 44_100),
        (11, 485_100),
        (12, WINDOW_SAMPLES),  # cut to the model's longest clip, not refused
        (47, WINDOW_SAMPLES),
        (10**30, WINDOW_SAMPLES),
        (1e300, WINDOW_SAMPLES),
        ("3", 132_300),  # any value that int() accepts
        (" 3 ", 132_300),
        (3.9, 132_300),
        (True, 44_100),
        (None, WINDOW_SAMPLES),
    ],
)
async def test_clip_has_the_requested_length_up_to_the_window(
    client: httpx.AsyncClient, seconds: Any, samples: int
) -> None:
    reply = await client.post("/generate", json={"prompt": "x", "seconds_total": seconds})
    assert len(expect_wav(reply, name=r"stable_audio_\d+_\d+\.wav")) == samples


@pytest.mark.parametrize(("window_s", "cap_s", "samples"), [(20.0, 120.0, 882_000), (20.0, 5.0, 220_500)])
async def test_window_is_limited_by_dialect_and_model(
    monkeypatch: pytest.MonkeyPatch, window_s: float, cap_s: float, samples: int
) -> None:
    monkeypatch.setattr(windowed_model, "WINDOW_S", window_s)
    catalog = ModelCatalog([ModelCard("engine", "x", max_duration_s=cap_s)])
    async with make_client(ToneBackend(catalog)) as (client, _):
        for sent in ({}, {"seconds_total": 30}):
            reply = await client.post("/generate", json={"prompt": "x", **sent})
            assert len(expect_wav(reply, name=r".*")) == samples


async def test_limits_of_other_dialects_do_not_apply() -> None:
    async with make_client(api={"max_steps": 10, "max_duration_s": 2}) as (client, _):
        reply = await client.post("/generate", json={"prompt": "x", "steps": 200})
        assert len(expect_wav(reply, name=r".*")) == WINDOW_SAMPLES


async def test_clip_is_normalized_to_full_scale(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    reply = await client.post("/generate", json={"prompt": "x", "seed": 3, "seconds_total": 2})
    pcm = expect_wav(reply, name=r".*")
    t = np.arange(2 * 44_100) / 44_100
    tone = (np.sin(2 * np.pi * 103 * t) * 0.5).astype(np.float32)  # the backend's output for seed 3
    expected = np.trunc(tone / np.abs(tone).max() * np.float32(32767))
    np.testing.assert_array_equal(pcm[:, 0], expected)
    np.testing.assert_array_equal(pcm[:, 0], pcm[:, 1])
    assert np.abs(pcm).max() == 32767


async def test_seed_repeats_and_random_seed_is_reported(client: httpx.AsyncClient) -> None:
    body = {"prompt": "x", "seconds_total": 1, "return_format": "base64"}
    first, metadata = expect_base64(await client.post("/generate", json=body))
    second, other = expect_base64(await client.post("/generate", json={**body, "seed": -1}))
    assert metadata["seed"] != other["seed"]
    again, _ = expect_base64(await client.post("/generate", json={**body, "seed": metadata["seed"]}))
    np.testing.assert_array_equal(again, first)
    assert len(second) == len(first)


@pytest.mark.parametrize("seed", [0, 2**32, 2**64, -5])
async def test_any_integer_is_a_seed(client: httpx.AsyncClient, seed: int) -> None:
    body = {"prompt": "x", "seconds_total": 1, "return_format": "base64"}
    first, metadata = expect_base64(await client.post("/generate", json={**body, "seed": seed}))
    again, _ = expect_base64(await client.post("/generate", json={**body, "seed": metadata["seed"]}))
    np.testing.assert_array_equal(again, first)


async def test_file_and_base64_have_the_same_content(client: httpx.AsyncClient) -> None:
    body = {"prompt": "x", "seconds_total": 1, "seed": 4}
    pcm, _ = expect_base64(await client.post("/generate", json={**body, "return_format": "base64"}))
    np.testing.assert_array_equal(pcm, expect_wav(await client.post("/generate", json=body), name=r".*"))


@pytest.mark.parametrize(("path", "form"), [("/generate", {}), (STYLE, {"audio_file": make_audio_file()})])
async def test_memory_is_reported_on_cuda(
    client: httpx.AsyncClient, backend: ToneBackend, path: str, form: dict[str, bytes]
) -> None:
    backend.device = DeviceUse("cuda", 1_234_000_000, 5_678_900_000)
    fields = {"prompt": "x", "return_format": "base64"}
    reply = await (client.post(path, data=fields, files=form) if form else client.post(path, json=fields))
    _, metadata = expect_base64(reply)
    assert set(metadata) == (STYLE_KEYS if form else CLIP_KEYS) | {"gpu_memory_used", "gpu_memory_peak"}
    used = (metadata["device"], metadata["gpu_memory_used"], metadata["gpu_memory_peak"])
    assert used == ("cuda", 1.23, 5.68)


async def test_configured_model_is_used() -> None:
    async with make_client(dialects={"model": "STABLE-AUDIO-3-medium"}) as (client, backend):
        assert (await client.post("/generate", json={"prompt": "x"})).headers["x-model"] == "medium"
        form = {"prompt": "x", "seed": "1"}
        assert (await client.post(STYLE, data=form, files={"audio_file": make_audio_file()})).status_code == 200
        assert [model for model, _ in backend.requests] == ["medium", "medium"]


async def test_fine_tune_selects_a_served_model() -> None:
    small = ModelCard("small", "x")
    tuned = ModelCard("tuned", "x", aliases=("someone/tuned", "someone/many/one.ckpt"))
    ways = (
        {"finetune_repo": "someone/tuned"},
        {"finetune_repo": "someone/many", "finetune_checkpoint": "one.ckpt"},
    )
    async with make_client(ToneBackend(ModelCatalog([small, tuned]))) as (client, backend):
        for repo in ways:
            for path, prompt in (("/generate", "x"), ("/generate/loop", "x 120bpm")):
                reply = await client.post(path, json={"prompt": prompt, "model_type": "finetune", **repo})
                assert reply.headers["x-model"] == "tuned"
        reply = await client.post("/saos/generate", json={"prompt": "x", "model_type": "finetune"})
        expect_refusal(reply, "finetune_repo is required for finetune models")
        reply = await client.post(
            "/saos/generate", json={"prompt": "x", "model_type": "finetune", "finetune_repo": "someone/else"}
        )
        expect_refusal(reply, "finetune_repo: unknown model 'someone/else'; valid: small, tuned")
        assert len(backend.requests) == 4


@pytest.mark.parametrize("prefix", ["", "/saos"])
async def test_style_transfer_uses_the_upload(client: httpx.AsyncClient, backend: ToneBackend, prefix: str) -> None:
    upload = make_audio_file(duration_s=1.5, rate_hz=22_050, channels=2)
    form = {"prompt": "aggressive techno 140bpm", "style_strength": "0.6", "seed": "5", "negative_prompt": "hum"}
    reply = await client.post(prefix + STYLE, data=form, files={"audio_file": ("in.wav", upload, "audio/wav")})
    assert len(expect_wav(reply, name=r"style_transfer_5_\d{10}\.wav")) == WINDOW_SAMPLES
    request = backend.last
    assert (request.prompt, request.negative_prompt) == (form["prompt"], "hum")
    assert (request.init_noise_level, request.steps, request.cfg_scale, request.seed) == (0.6, 8, 6.0, 5)
    assert request.init_audio is not None
    assert request.init_audio.samples.shape == (1, 33_075)
    assert request.init_audio.sample_rate_hz == 22_050


async def test_upload_is_mixed_to_mono(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    tone = make_audio_file(duration_s=0.5, channels=1)
    both = make_audio_file(duration_s=0.5, channels=2)
    for upload in (tone, both):
        reply = await client.post(STYLE, data={"prompt": "x"}, files={"audio_file": upload})
        assert reply.status_code == 200
    first, second = (request.init_audio for _, request in backend.requests)
    assert first is not None
    assert second is not None
    np.testing.assert_allclose(first.samples, second.samples, atol=1e-6)


async def test_metadata_of_style_transfer(client: httpx.AsyncClient) -> None:
    form = {"prompt": "x 100bpm", "return_format": "base64", "steps": "100", "cfg_scale": "2.5"}
    upload = make_audio_file(duration_s=1.0, rate_hz=48_000, channels=1)
    pcm, metadata = expect_base64(await client.post(STYLE, data=form, files={"audio_file": upload}))
    assert len(pcm) == WINDOW_SAMPLES
    assert set(metadata) == STYLE_KEYS
    assert metadata["duration_seconds"] == 12
    assert metadata["input_audio_shape"] == [2, 44_100]
    assert (metadata["style_strength"], metadata["steps"], metadata["cfg_scale"]) == (0.8, 100, 2.5)
    assert (metadata["detected_bpm"], metadata["negative_prompt"]) == (100, None)


async def test_long_upload_is_cut_to_the_usable_part(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    upload = make_audio_file(duration_s=60.0, rate_hz=8000, channels=1)
    assert (await client.post(STYLE, data={"prompt": "x"}, files={"audio_file": upload})).status_code == 200
    assert backend.last.init_audio is not None
    assert 12 * 8000 < backend.last.init_audio.samples.shape[1] < 20 * 8000
