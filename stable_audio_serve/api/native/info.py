"""What the server says about itself: health and the list of models. Never loads a model and never waits for one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stable_audio_serve.api.service import Service
from stable_audio_serve.core.catalog import ModelCard, ModelStatus
from stable_audio_serve.core.settings_sources import preloaded_names

_UNKNOWN = ModelStatus("loading")


def health(service: Service, status: Mapping[str, ModelStatus]) -> tuple[int, dict[str, Any]]:
    """HTTP status and body: 200 while alive, also while loading; 503 only when every model has failed."""
    settings, catalog = service.settings, service.backend.catalog
    api = settings.api
    stages = {card.name: status.get(card.name, _UNKNOWN).stage for card in catalog}
    loaded = sorted(name for name, stage in stages.items() if stage == "ready")
    is_healthy = any(stage != "failed" for stage in stages.values())
    body = {
        "status": "ok" if loaded else "loading" if is_healthy else "failed",
        "healthy": is_healthy,
        "model": catalog.default.name,
        "device": settings.device,
        "loaded": bool(loaded),
        "model_loaded": bool(loaded),
        "cuda_available": any((item.device or "").startswith("cuda") for item in status.values()),
        "storage_backend": "s3" if settings.storage.bucket else "local",
        "available_models": [card.name for card in catalog],
        "loaded_models": loaded,
        "preload_models": list(preloaded_names(settings, catalog)),
        "model_duration_limits_seconds": {card.name: min(api.max_duration_s, card.max_duration_s) for card in catalog},
        "max_duration_seconds": api.max_duration_s,
        "max_steps": api.max_steps,
        "max_batch_size": api.max_batch_size,
        "models": {card.name: _describe_status(card, status.get(card.name, _UNKNOWN)) for card in catalog},
    }
    return (200 if is_healthy else 503), body


def model_list(service: Service, *, created_at: int) -> dict[str, Any]:
    """The models in the form of OpenAI's list, which its client libraries parse."""
    longest_s = service.settings.api.max_duration_s
    return {
        "object": "list",
        "data": [
            {
                "id": card.name,
                "object": "model",
                "created": created_at,
                "owned_by": "stable-audio-serve",
                "root": card.name,
                "parent": None,
                "max_model_len": None,
                "permission": [],
                "family": card.family,
                "description": card.description,
                "aliases": list(card.aliases),
                "is_demo": card.is_demo,
                "is_default": card.name == service.backend.catalog.default.name,
                "max_duration_s": min(longest_s, card.max_duration_s),
                "sample_rate_hz": card.sample_rate_hz,
                "channels": card.channels,
                "default_steps": card.default_steps,
                "default_cfg_scale": card.default_cfg_scale,
            }
            for card in service.backend.catalog
        ],
    }


def _describe_status(card: ModelCard, status: ModelStatus) -> dict[str, Any]:
    return {
        "stage": status.stage,
        "demo": card.is_demo,
        "device": status.device,
        "num_replicas": status.num_replicas,
        "detail": dict(status.detail or {}),
    }
