"""The four APIs that were made for Stable Audio Open (dialects), with small checkpoints of this model family.

A request without a model gets a Stable Audio Open model. Clips have the length that the original servers return.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio
import soundfile

from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.models.registry import resolve_entry
from stable_audio_serve.serving.engines import load_engine
from stable_audio_serve.serving.local import LocalBackend
from stable_audio_serve.serving.placement import plan_deployments
from tests.api.compat.serving import make_client
from tests.audio_files import make_audio_file
from tests.goldens import load_open_goldens
from tests.models.sao.tiny import TINY
from tests.parameters import slow
from tests.serving.conftest import model

RATE_HZ = 1000
# The longest clip of each model. For tiny-small, it is 524288 samples at 44.1 kHz, although the config says 11.904 s.
WINDOW_S = {"tiny-1.0": 47.552, "tiny-small": 11.888}
PROMPT = "warm house synth loop 120 bpm"

pytestmark = [pytest.mark.server, pytest.mark.asyncio(loop_scope="module")]


@dataclass(frozen=True, slots=True)
class Served:
    """A server with the demo model, which is the default model, and with the Stable Audio Open model `name`."""

    name: str
    client: httpx.AsyncClient
    backend: LocalBackend

    async def make(self, **fields: Any) -> npt.NDArray[np.float32]:
        """Return the audio (2, samples) that the Stable Audio Open model's engine generates for a request."""
        request = GenerationRequest(**{"prompt": PROMPT, "seed": 5, "steps": 4, **fields})
        return (await self.backend.generate(self.name, request)).audio[0]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(request: pytest.FixtureRequest) -> AsyncIterator[Served]:
    name: str = request.param
    models = [{"name": "demo", "engine": {"warmup_budget_s": 0}}, model(name, str(load_open_goldens(name).folder))]
    values = {"models": models, "default_model": "demo", "device": "cpu"}
    settings = Settings.model_validate(values)
    engines = {model.name: load_engine(settings, model) for model in settings.models}
    async with (
        LocalBackend(plan_deployments(settings).catalog, engines) as backend,
        make_client(backend, audio={"peaks": "clip"}, **values) as (client, _),  # type: ignore[arg-type]
    ):
        client.timeout = httpx.Timeout(120)
        yield Served(name, client, backend)


def read(data: bytes) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(soundfile.read(io.BytesIO(data), dtype="float32")[0].T)


def as_pcm(audio: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """Convert to 16 bits as the original Open Small server does: divide by the peak, multiply by 32767 and truncate."""
    return (np.clip(audio / np.abs(audio).max(), -1, 1) * 32767).astype(np.int16)


def assert_same(actual: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> None:
    """Check that two clips, clipped to -1..1, differ by at most one 16-bit step."""
    np.testing.assert_allclose(actual, np.clip(expected, -1, 1), rtol=0, atol=1.1 / 32768)


@pytest.mark.parametrize("served", TINY, indirect=True)
async def test_vllm_clip_is_conditioned_on_its_start_and_end(served: Served) -> None:
    body = {"input": PROMPT, "audio_length": 3, "audio_start": 2, "num_inference_steps": 4, "guidance_scale": 3}
    reply = await served.client.post("/v1/audio/generate", json=body | {"seed": 5})
    assert reply.status_code == 200, reply.text
    knows_starts = served.name == "tiny-1.0"
    whole = await served.make(duration_s=5, start_s=2 if knows_starts else 0, conditioned_total_s=5, cfg_scale=3)
    assert_same(read(reply.content), whole[:, 2 * RATE_HZ :])


@pytest.mark.parametrize("served", ["tiny-small", slow("tiny-1.0")], indirect=True)
async def test_open_small_clip_is_normalised_before_it_is_cut(served: Served) -> None:
    window_s = min(WINDOW_S[served.name], 524_288 / 44_100)
    body = {"prompt": PROMPT, "seed": 5, "steps": 4, "cfg_scale": 2, "negative_prompt": "noise", "seconds_total": 3}
    reply = await served.client.post("/generate", json=body | {"return_format": "base64"})
    assert reply.status_code == 200, reply.text
    window = await served.make(duration_s=window_s, conditioned_total_s=12, cfg_scale=2, negative_prompt="noise")
    answer = reply.json()
    actual = soundfile.read(io.BytesIO(base64.b64decode(answer["audio_base64"])), dtype="int16")[0].T
    np.testing.assert_array_equal(actual, as_pcm(window)[:, : 3 * RATE_HZ])
    assert answer["metadata"]["duration_seconds"] == 3


@pytest.mark.parametrize("served", ["tiny-small", slow("tiny-1.0")], indirect=True)
async def test_open_small_loop_is_a_cut_of_the_window(served: Served) -> None:
    form = {"prompt": "house drum loop 128bpm", "loop_type": "auto", "seed": "5", "steps": "4", "cfg_scale": "6"}
    upload = make_audio_file(duration_s=4.0, rate_hz=RATE_HZ, channels=1)
    source = SourceAudio(read(upload)[None] if read(upload).ndim == 1 else read(upload), RATE_HZ)
    window_s = min(WINDOW_S[served.name], 524_288 / 44_100)
    common = {"prompt": form["prompt"], "duration_s": window_s, "conditioned_total_s": 12, "cfg_scale": 6}
    for files, edit in (
        (None, {}),
        ({"audio_file": upload}, {"init_audio": source, "init_noise_level": 0.8}),
    ):
        reply = await served.client.post("/generate/loop", data=form | {"style_strength": "0.8"}, files=files)
        assert reply.status_code == 200, reply.text
        actual = soundfile.read(io.BytesIO(reply.content), dtype="int16")[0].T
        assert actual.shape == (2, 7500)
        np.testing.assert_array_equal(actual, as_pcm(await served.make(**common, **edit))[:, :7500])


async def until_done(served: Served, url: str, field: str, *, done: str) -> dict[str, Any]:
    async with asyncio.timeout(120):
        while True:
            body: dict[str, Any] = (await served.client.get(url)).json()
            if body[field] == done:
                return body
            assert body[field].lower() not in ("error", "failed"), body
            await asyncio.sleep(0.05)


async def fetch(served: Served, url: str) -> npt.NDArray[np.float32]:
    reply = await served.client.get(url)
    assert reply.status_code == 200
    return read(reply.content)


@pytest.mark.parametrize("served", ["tiny-small", slow("tiny-1.0")], indirect=True)
async def test_aiml_clip_has_its_duration(served: Served) -> None:
    body = {"model": "stable-audio", "prompt": PROMPT, "seconds_total": 9, "seconds_start": 1, "steps": 4}
    made = (await served.client.post("/v2/generate/audio", json=body)).json()
    ended = await until_done(served, f"/v2/generate/audio?generation_id={made['id']}", "status", done="completed")
    audio = await fetch(served, ended["audio_file"]["url"])
    assert audio.shape == (2, 9 * RATE_HZ)
    assert np.abs(audio).max() > 0.01


@pytest.mark.parametrize("served", ["tiny-1.0", slow("tiny-small")], indirect=True)
async def test_fal_clip_has_its_duration(served: Served) -> None:
    body = {"prompt": PROMPT, "seconds_total": 8, "seconds_start": 1, "steps": 4}
    reply = await served.client.post("/fal-ai/stable-audio", json=body)
    assert reply.status_code == 200, reply.text
    audio = await fetch(served, reply.json()["audio_file"]["url"])
    assert audio.shape == (2, 8 * RATE_HZ)
    queued = (await served.client.post("/queue/fal-ai/stable-audio", json=body)).json()
    await until_done(served, queued["status_url"], "status", done="COMPLETED")
    result = (await served.client.get(queued["response_url"])).json()
    assert (await fetch(served, result["audio_file"]["url"])).shape == (2, 8 * RATE_HZ)


@pytest.mark.parametrize("served", ["tiny-1.0", slow("tiny-small")], indirect=True)
async def test_other_routes_use_the_default_model(served: Served) -> None:
    reply = await served.client.post("/v1/audio/generations", json={"prompt": "x", "duration": 1, "steps": 1})
    assert reply.headers["content-disposition"].startswith("attachment")
    assert "demo" in reply.headers["content-disposition"]
    assert resolve_entry("demo").card.family == "stable-audio-3"
