"""Model information and health of the Stable Audio Open Small dialect."""

from __future__ import annotations

import httpx
import pytest

from stable_audio_serve.core.catalog import ModelCard, ModelCatalog, ModelStatus
from tests.api.compat.serving import make_client
from tests.backends import ToneBackend


@pytest.mark.parametrize("prefix", ["", "/saos"])
async def test_model_info_matches_the_documentation(prefix: str) -> None:
    """With the original model, the response is exactly the documented one."""
    small = ModelCard(
        "stable-audio-open-small", "stable-audio-open", max_duration_s=524_288 / 44_100, latent_channels=64
    )
    backend = ToneBackend(ModelCatalog([small]), statuses={small.name: ModelStatus("ready", 1, "cuda")})
    async with make_client(backend) as (client, _):
        reply = await client.get(f"{prefix}/model/info")
    assert reply.status_code == 200
    assert reply.json() == {
        "config": {
            "diffusion_objective": "rf_denoiser",
            "io_channels": 64,
            "max_duration_seconds": 12,
            "sample_rate": 44100,
            "sample_size": 524288,
        },
        "device": "cuda",
        "model_name": "stable-audio-open-small",
        "supported_endpoints": {
            "/generate": "Text-to-audio generation",
            "/generate/loop": "BPM-aware loop generation (text or style transfer)",
            "/generate/style-transfer": "Audio-to-audio style transfer",
        },
        "supported_parameters": {
            "bars": {"default": "auto", "options": [1, 2, 4, 8], "type": "int"},
            "cfg_scale": {"default": 6.0, "range": "0-20", "type": "float"},
            "loop_type": {"default": "auto", "options": ["drums", "instruments", "auto"], "type": "string"},
            "negative_prompt": {"required": False, "type": "string"},
            "prompt": {"required": True, "type": "string"},
            "return_format": {"default": "file", "options": ["file", "base64"], "type": "string"},
            "seed": {"default": -1, "note": "-1 for random", "type": "int"},
            "steps": {"default": 8, "range": "1-100", "type": "int"},
            "style_strength": {"default": 0.8, "note": "For style transfer", "range": "0.1-1.0", "type": "float"},
        },
    }


async def test_model_info_describes_the_served_model() -> None:
    async with make_client(dialects={"model": "demo"}) as (client, _):
        info = (await client.get("/model/info")).json()
    assert (info["model_name"], info["device"]) == ("demo", None)
    assert (info["config"]["sample_size"], info["config"]["max_duration_seconds"]) == (220_500, 5)
    assert info["supported_parameters"]["steps"]["default"] == 100


@pytest.mark.parametrize(
    ("status", "loaded", "cuda"),
    [
        (ModelStatus("ready", 1, "cuda:0"), True, True),
        (ModelStatus("ready", 1, "cpu"), True, False),
        (ModelStatus("loading"), False, False),
        (ModelStatus("idle"), False, False),
    ],
)
async def test_health_under_the_prefix(
    client: httpx.AsyncClient, backend: ToneBackend, status: ModelStatus, loaded: bool, cuda: bool
) -> None:
    backend.statuses = {"small-sfx": status}
    reply = await client.get("/saos/health")
    assert reply.status_code == 200
    assert reply.json() == {
        "status": "healthy",
        "model_loaded": loaded,
        "device": status.device,
        "cuda_available": cuda,
        "model_info": {"sample_rate": 44100, "sample_size": 524288, "diffusion_objective": "rf_denoiser"},
    }
    assert backend.requests == []


async def test_health_of_a_model_that_failed_to_load(client: httpx.AsyncClient, backend: ToneBackend) -> None:
    backend.statuses = {"small-sfx": ModelStatus("failed"), "medium": ModelStatus("ready")}
    reply = await client.get("/saos/health")
    assert reply.status_code == 500
    assert reply.json() == {"status": "error", "model_loaded": False, "error": "the model cannot be loaded"}


@pytest.mark.parametrize("url", ["/riffs/available", "/model/info", "/health"])
async def test_routes_that_take_get_take_head(client: httpx.AsyncClient, url: str) -> None:
    for prefix in ("", "/saos"):
        got, head = await client.get(prefix + url), await client.head(prefix + url)
        assert (head.status_code, head.headers["content-length"]) == (200, got.headers["content-length"])
