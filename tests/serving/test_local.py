"""The HTTP API with engines in the same process (`LocalBackend`), without Ray."""

from __future__ import annotations

import httpx

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.serving.engines import load_engine
from stable_audio_serve.serving.local import LocalBackend
from stable_audio_serve.serving.placement import plan_deployments
from tests.serving.conftest import TINY


async def test_api_runs_on_engines_without_ray() -> None:
    settings = Settings.model_validate({"models": [{"name": "tiny", "path": TINY}]})
    plan = plan_deployments(settings)
    engines = {model.name: load_engine(settings, model) for model in settings.models}
    async with LocalBackend(plan.catalog, engines) as backend:
        transport = httpx.ASGITransport(create_app(backend, settings))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            response = await client.post("/generate", json={"prompt": "wind", "duration": 2, "steps": 2})
            health = (await client.get("/health")).json()
    assert response.status_code == 200
    assert response.headers["x-model"] == "tiny"
    assert health["loaded_models"] == ["tiny"]
