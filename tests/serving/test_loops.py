"""Loops of the packaged demo model have the exact number of samples and keep their beat when they are repeated."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import pytest_asyncio
import soundfile

from examples.demo_model.checks import has_loose_tempo, has_strict_tempo, onset_times_s
from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.serving.engines import load_engine
from stable_audio_serve.serving.local import LocalBackend
from stable_audio_serve.serving.placement import plan_deployments
from tests.audio_files import make_audio_file
from tests.parameters import few

ROUNDS = 4

pytestmark = [pytest.mark.server, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    riffs: Path = tmp_path_factory.mktemp("riffs")
    (riffs / "a_90bpm_1.wav").write_bytes(make_audio_file(duration_s=12.0, hz=440.0))
    settings = Settings.model_validate(
        {
            "models": [{"name": "demo", "engine": {"warmup_budget_s": 0}}],
            "output_dir": str(tmp_path_factory.mktemp("outputs")),
            "dialects": {"riff_dir": str(riffs)},
        }
    )
    engines = {model.name: load_engine(settings, model) for model in settings.models}
    async with LocalBackend(plan_deployments(settings).catalog, engines) as backend:
        app = create_app(backend, settings)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=120) as client,
        ):
            yield client


async def get_audio(client: httpx.AsyncClient, url: str, **form: str) -> np.ndarray:
    """Send the form to the route. Return the audio of the response (2, samples) as float32."""
    reply = await client.post(url, data=form)
    assert reply.status_code == 200, reply.text
    return np.ascontiguousarray(soundfile.read(io.BytesIO(reply.content), dtype="float32")[0].T)


@pytest.mark.parametrize(
    ("prompt", "bpm", "samples"),
    few(
        [
            ("drum loop 74 bpm", 74, 286_054),
            ("drum loop 120bpm", 120, 352_800),
            ("drum loop 128BPM", 128, 330_750),
            ("drum loop 170bpm", 170, 498_070),
        ],
        number=1,
    ),
)
async def test_loop_keeps_its_beat_when_repeated(
    client: httpx.AsyncClient, prompt: str, bpm: int, samples: int
) -> None:
    loop = await get_audio(client, "/generate/loop", prompt=prompt, seed="3")
    assert loop.shape == (2, samples)
    assert has_loose_tempo(np.tile(loop, ROUNDS), bpm)


async def test_no_beat_is_lost_or_added_at_the_seam(client: httpx.AsyncClient) -> None:
    loop = await get_audio(client, "/generate/loop", prompt="metronome 133 bpm", cfg_scale="1", bars="4", seed="2")
    assert loop.shape == (2, 4 * 240 * 44_100 // 133)
    repeated = np.tile(loop, ROUNDS)
    assert has_strict_tempo(repeated, 133)
    beats = np.diff(onset_times_s(repeated)) * 133 / 60
    assert abs(beats - 1).max() < 0.15  # from one onset to the next is one beat, even where the loop repeats
    assert len(beats) + 1 == pytest.approx(ROUNDS * 16, abs=1)


async def test_loop_from_a_riff_keeps_its_pitch(client: httpx.AsyncClient) -> None:
    form = {"prompt": "440 Hz sine 120bpm", "key": "a", "style_strength": "0.3", "seed": "3"}
    loop = await get_audio(client, "/generate/loop-with-riff", **form)
    assert loop.shape == (2, 352_800)
    spectrum = np.abs(np.fft.rfft(loop[0] * np.hanning(loop.shape[1])))
    # Stretching the riff to the tempo must not change its pitch.
    assert spectrum.argmax() * 44_100 / loop.shape[1] == pytest.approx(440, rel=0.01)


async def test_documented_clip_and_style_transfer(client: httpx.AsyncClient) -> None:
    body = {"prompt": "a 440 Hz sine wave", "steps": 2, "cfg_scale": 1.0, "seed": 12345}
    clip = await client.post("/generate", json=body)
    assert soundfile.info(io.BytesIO(clip.content)).frames == 524_288
    form = {"prompt": "a 440 Hz sine wave", "style_strength": "0.4", "steps": "2", "return_format": "base64"}
    reply = await client.post("/generate/style-transfer", data=form, files={"audio_file": clip.content})
    assert reply.status_code == 200, reply.text
    metadata = reply.json()["metadata"]
    assert (metadata["duration_seconds"], metadata["input_audio_shape"]) == (12, [2, 524_288])
    assert metadata["generation_time"] > 0
    assert metadata["device"] == "cpu"
