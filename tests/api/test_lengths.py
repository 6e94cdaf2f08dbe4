"""The number of samples in a file matches the requested duration exactly, with a real engine."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator

import httpx
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.catalog import ModelCard, ModelCatalog
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.serving.local import LocalBackend
from tests.factories import ToyModel

pytestmark = pytest.mark.server

RATE_HZ = ToyModel().spec.card.sample_rate_hz
LONGEST_S = ToyModel().spec.card.max_duration_s


@pytest.fixture
async def toy_client() -> AsyncIterator[httpx.AsyncClient]:
    model = ToyModel()
    card = ModelCard("toy", "toy", max_duration_s=LONGEST_S, sample_rate_hz=RATE_HZ)
    engine = Engine(model, EngineOptions(torch_threads=1, warmup_budget_s=0.0))
    async with LocalBackend(ModelCatalog([card]), {"toy": engine}) as backend:
        transport = httpx.ASGITransport(create_app(backend, Settings()))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield client


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    duration_s=st.floats(1 / RATE_HZ, LONGEST_S) | st.integers(1, int(LONGEST_S * 100)).map(lambda n: n / 100),
    padding_s=st.floats(0, 30),
    file_format=st.sampled_from(["wav", "wav", "flac", "ogg"]),
    batch_size=st.sampled_from([1, 1, 1, 2]),
)
async def test_file_has_exactly_the_requested_samples(
    toy_client: httpx.AsyncClient, duration_s: float, padding_s: float, file_format: str, batch_size: int
) -> None:
    body = {
        "prompt": "x",
        "duration": duration_s,
        "steps": 1,
        "seed": 1,
        "duration_padding_sec": padding_s,
        "response_format": file_format,
        "batch_size": batch_size,
    }
    reply = await toy_client.post("/v1/audio/generations", json=body)
    assert reply.status_code == 200, reply.text
    assert len(reply.content) == int(reply.headers["content-length"])
    if batch_size == 1:
        info = soundfile.info(io.BytesIO(reply.content))
        assert (info.frames, info.samplerate, info.channels) == (int(duration_s * RATE_HZ), RATE_HZ, 2)
