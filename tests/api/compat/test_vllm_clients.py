"""Unmodified clients with a real server: `requests`, as in the documented example, and `openai`."""

from __future__ import annotations

import asyncio
import wave
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import requests

from stable_audio_serve.core.keys import hash_key
from tests.api.test_connections import serve
from tests.backends import ToneBackend
from tests.patience import PATIENCE_S


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with serve(ToneBackend()) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
async def locked_url() -> AsyncIterator[str]:
    async with serve(ToneBackend(), key_hashes=[hash_key("token-abc123")]) as port:
        yield f"http://127.0.0.1:{port}"


def run_example_client(url: str, file: Path, **options: Any) -> str | None:
    """Run the documented example script. Returns None if the script wrote the audio file, otherwise what it printed."""
    payload = {"input": "The sound of a hammer", "audio_length": 10.0, "audio_start": 0.0, "response_format": "wav"}
    payload |= {key: value for key, value in options.items() if value}
    reply = requests.post(f"{url}/v1/audio/generate", json=payload, timeout=PATIENCE_S)
    if reply.status_code != 200:
        return reply.text
    file.write_bytes(reply.content)
    return None


async def test_documented_example_client(url: str, tmp_path: Path) -> None:
    options = {"negative_prompt": "Low quality", "guidance_scale": 7.0, "num_inference_steps": 100, "seed": None}
    file = tmp_path / "out.wav"
    for base in (url, f"{url}/vllm"):
        assert await asyncio.to_thread(run_example_client, base, file, **options) is None
        with wave.open(str(file)) as audio:
            assert audio.getnframes() == 441_000
    refused = await asyncio.to_thread(run_example_client, url, file, model="xxx")
    assert refused is not None
    assert "NotFoundError" in refused


async def test_openai_lists_the_models(url: str) -> None:
    import openai  # imported here, because it loads slowly in each process that collects this test

    for base in (f"{url}/v1", f"{url}/vllm/v1"):
        async with openai.AsyncOpenAI(base_url=base, api_key="unused", max_retries=0) as client:
            models = (await client.models.list()).data
        assert [model.id for model in models] == ["small-sfx", "small-music", "medium", "demo"]
        assert all(model.object == "model" and model.created > 1_600_000_000 for model in models)


async def test_openai_with_keys(locked_url: str) -> None:
    import openai

    async with openai.AsyncOpenAI(base_url=f"{locked_url}/v1", api_key="token-abc123", max_retries=0) as client:
        assert len((await client.models.list()).data) == 4
    async with openai.AsyncOpenAI(base_url=f"{locked_url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="Authorization"):
            await client.models.list()
    health = await asyncio.to_thread(requests.get, f"{locked_url}/health", timeout=PATIENCE_S)
    assert health.status_code == 200


async def test_openai_reads_the_error(url: str) -> None:
    import openai

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.post("/audio/generate", body={"input": ""}, cast_to=object)
    assert caught.value.param == "input"
    assert "input" in str(caught.value)
