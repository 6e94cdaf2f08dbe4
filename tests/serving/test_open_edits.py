"""Inpainting and continuation over HTTP with Stable Audio Open models, whose networks have no mask input."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from functools import cache

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio
import soundfile

from stable_audio_serve.api.app import create_app
from stable_audio_serve.audio.prepare import prepare_source
from stable_audio_serve.core.generation import SourceAudio
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.protocol import DecodeWindow, EncodeWindow
from stable_audio_serve.models.registry import resolve_entry
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.sampling.noise import SeededNoise
from stable_audio_serve.serving.engines import load_engine
from stable_audio_serve.serving.local import LocalBackend
from stable_audio_serve.serving.placement import plan_deployments
from tests.audio_files import make_audio_file, pcm_of
from tests.goldens import load_open_goldens
from tests.models.sao.tiny import TINY
from tests.parameters import few
from tests.serving.conftest import model

RATE_HZ, SEED, DURATION_S = 1000, 7, 10
SAMPLERS = {"tiny-1.0": ("dpmpp-3m-sde", "k-heun", "v-ddim"), "tiny-small": ("pingpong", "euler", "dpmpp")}
CASES = [(name, SAMPLERS[name][index]) for index in range(3) for name in TINY]
SOURCE_S = 9.0
SOURCE = make_audio_file(duration_s=SOURCE_S, rate_hz=RATE_HZ, hz=110.0)

pytestmark = [pytest.mark.server, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    models = [model(name, str(load_open_goldens(name).folder)) for name in TINY]
    settings = Settings.model_validate(
        {"models": models, "device": "cpu", "output_dir": str(tmp_path_factory.mktemp("outputs"))}
    )
    engines = {model.name: load_engine(settings, model) for model in settings.models}
    async with LocalBackend(plan_deployments(settings).catalog, engines) as backend:
        app = create_app(backend, settings)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=120) as client,
        ):
            yield client


def make_fields(name: str, sampler: str, **fields: object) -> dict[str, object]:
    body = {"model": name, "prompt": "a bell", "seed": SEED, "duration": DURATION_S, "steps": 3, "peaks": "clip"}
    return body | {"sampler_kwargs": {"sampler_type": sampler}} | fields


async def edit(client: httpx.AsyncClient, name: str, sampler: str, *regions: tuple[float, float]) -> bytes:
    starts, ends = zip(*regions, strict=True)
    fields = make_fields(
        name, sampler, inpaint_start_seconds=list(starts), inpaint_end_seconds=list(ends), keep="model"
    )
    data = {key: value if isinstance(value, str) else json.dumps(value) for key, value in fields.items()}
    reply = await client.post("/v1/audio/inpaint", data=data, files={"audio": ("a.wav", SOURCE)})
    assert reply.status_code == 200, reply.text
    return reply.content


def read(data: bytes) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(soundfile.read(io.BytesIO(data), dtype="float32")[0].T)


@cache
def reconstruct_source(name: str) -> tuple[npt.NDArray[np.float32], float]:
    """Encode and decode the source clip. Return the decoded audio, and how many seconds a latent frame affects."""
    model = load_model(resolve_entry(name, path=str(load_open_goldens(name).folder)))
    assert isinstance(model, SaoModel)
    frames, hop = model.config.window_frames, model.spec.hop
    samples = prepare_source(
        SourceAudio(read(SOURCE), RATE_HZ), sample_rate_hz=RATE_HZ, channels=2, num_samples=frames * hop
    )
    window = EncodeWindow(samples=samples, start=0, stage="inpaint", noise=SeededNoise(SEED))
    latents = model.encode_audio([window])[0]
    audio = model.decode([DecodeWindow(latents=latents, start=0, noise=SeededNoise(SEED))])[0].numpy()
    return audio[:, : DURATION_S * RATE_HZ], (model.config.autoencoder.decoder_halo_latents + 1) * hop / RATE_HZ


def differences(audio: npt.NDArray[np.float32], name: str, *, start_s: float, end_s: float) -> npt.NDArray[np.float32]:
    span = slice(int(start_s * RATE_HZ), int(end_s * RATE_HZ))
    expected = np.clip(reconstruct_source(name)[0], -1.0, 1.0)
    assert float(np.abs(expected[:, span]).max()) > 0.01
    return np.abs(audio - expected)[:, span]


@pytest.mark.parametrize(("name", "sampler"), few(CASES))
async def test_inpainting_keeps_the_audio_outside_the_region(
    client: httpx.AsyncClient, name: str, sampler: str
) -> None:
    audio, reach_s = read(await edit(client, name, sampler, (3.0, 6.0))), reconstruct_source(name)[1]
    for start_s, end_s in ((0.0, 3.0 - reach_s), (6.0 + reach_s, SOURCE_S)):
        assert differences(audio, name, start_s=start_s, end_s=end_s).max() < 1e-3
    assert differences(audio, name, start_s=3.0 + reach_s, end_s=6.0 - reach_s).mean() > 0.01


@pytest.mark.parametrize(("name", "sampler"), few(CASES))
async def test_continuation_keeps_the_source_and_extends_it(client: httpx.AsyncClient, name: str, sampler: str) -> None:
    audio, reach_s = read(await edit(client, name, sampler, (5.0, DURATION_S))), reconstruct_source(name)[1]
    assert audio.shape[-1] == DURATION_S * RATE_HZ
    assert differences(audio, name, start_s=0.0, end_s=5.0 - reach_s).max() < 1e-3
    assert differences(audio, name, start_s=5.0 + reach_s, end_s=DURATION_S).mean() > 0.01


@pytest.mark.parametrize(("name", "sampler"), few(CASES))
async def test_region_over_the_whole_clip_is_text_to_audio(client: httpx.AsyncClient, name: str, sampler: str) -> None:
    plain = await client.post("/v1/audio/generations", json=make_fields(name, sampler))
    assert plain.status_code == 200, plain.text
    assert pcm_of(await edit(client, name, sampler, (0.0, DURATION_S))) == pcm_of(plain.content)
