"""The dialect's model information and health. The functions load no model."""

from __future__ import annotations

from typing import Any

from stable_audio_serve.api.compat.stable_audio_open_small.windowed_model import WindowedModel
from stable_audio_serve.core.catalog import ModelStatus

_ENDPOINTS = {
    "/generate": "Text-to-audio generation",
    "/generate/loop": "BPM-aware loop generation (text or style transfer)",
    "/generate/style-transfer": "Audio-to-audio style transfer",
}


def describe_model(model: WindowedModel, status: ModelStatus) -> dict[str, Any]:
    """Return the response of `GET /model/info`: the model and the parameters that requests accept."""
    card = model.card
    return {
        "model_name": card.name,
        "device": status.device,
        "config": {
            **describe_window(model),
            "io_channels": card.latent_channels,
            "max_duration_seconds": round(model.window_s),
        },
        "supported_endpoints": _ENDPOINTS,
        "supported_parameters": {
            "bars": {"default": "auto", "options": [1, 2, 4, 8], "type": "int"},
            "cfg_scale": {"default": 6.0, "range": "0-20", "type": "float"},
            "loop_type": {"default": "auto", "options": ["drums", "instruments", "auto"], "type": "string"},
            "negative_prompt": {"required": False, "type": "string"},
            "prompt": {"required": True, "type": "string"},
            "return_format": {"default": "file", "options": ["file", "base64"], "type": "string"},
            "seed": {"default": -1, "note": "-1 for random", "type": "int"},
            "steps": {"default": model.steps(None, at_most=100), "range": "1-100", "type": "int"},
            "style_strength": {"default": 0.8, "note": "For style transfer", "range": "0.1-1.0", "type": "float"},
        },
    }


def describe_health(model: WindowedModel, status: ModelStatus) -> tuple[int, dict[str, Any]]:
    """Return the status code and the body of the dialect's `GET /health`. A model that is still loading is healthy."""
    if status.stage == "failed":
        return 500, {"status": "error", "model_loaded": False, "error": "the model cannot be loaded"}
    return 200, {
        "status": "healthy",
        "model_loaded": status.stage == "ready",
        "device": status.device,
        "cuda_available": (status.device or "").startswith("cuda"),
        "model_info": describe_window(model),
    }


def describe_window(model: WindowedModel) -> dict[str, Any]:
    """Return the sample rate, the longest clip in samples, and the model's objective."""
    return {
        "diffusion_objective": model.card.objective,
        "sample_rate": model.card.sample_rate_hz,
        "sample_size": model.num_window_samples,
    }
