"""The HTTP API with engines in the same process (`LocalBackend`), without Ray."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.serving.adapters import Library
from stable_audio_serve.serving.engines import load_named_engine
from stable_audio_serve.serving.local import LocalBackend
from stable_audio_serve.serving.placement import plan_deployments
from tests.adapter_files import write_file
from tests.audio_files import pcm_of
from tests.serving.conftest import TINY, model


async def test_api_and_adapters_work_on_engines_without_ray(tmp_path: Path) -> None:
    write_file(tmp_path / "other.safetensors")  # for a model of other shapes
    loras = {name: str(Path(TINY) / "lora" / f"{name}.safetensors") for name in ("lora_all", "dora_rows_layers")}
    tiny = model("tiny", loras=loras, lora_folder=str(tmp_path), max_loras=2)
    settings = Settings.model_validate({"models": [tiny], "output_dir": str(tmp_path / "out")})
    plan = plan_deployments(settings)
    library = Library(plan.settings, plan.catalog)
    library.start()
    engines = {model.name: load_named_engine(plan.settings, model) for model in plan.settings.models}
    async with LocalBackend(plan.catalog, engines) as backend:
        transport = httpx.ASGITransport(create_app(backend, plan.settings, adapters=library))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:

            async def make(**fields: Any) -> httpx.Response:
                body = {"prompt": "wind", "duration": 1, "steps": 2, "seed": 1, **fields}
                return await client.post("/v1/audio/generations", json=body)

            plain, off, on, named, both, wrong = await asyncio.gather(
                make(),
                make(loras=[{"name": "lora_all", "strength": 0}]),
                make(loras=[{"name": "lora_all"}]),
                make(model="tiny:lora_all"),
                make(model="tiny:lora_all+dora_rows_layers"),
                make(loras=[{"name": "other"}]),
            )
            response = await client.post("/generate", json={"prompt": "wind", "duration": 1, "steps": 1})
            health = (await client.get("/health")).json()
            recipe = json.loads(both.headers["x-recipe"])
            replayed = await client.post("/v1/audio/replay", json=recipe)
    assert response.status_code == 200
    assert response.headers["x-model"] == "tiny"
    assert health["loaded_models"] == ["tiny"]
    assert pcm_of(off.content) == pcm_of(plain.content)
    assert on.content == named.content
    assert len({pcm_of(reply.content) for reply in (plain, on, both)}) == 3
    assert replayed.headers["x-replay"] == "exact"
    assert replayed.content == both.content
    assert [one["name"] for one in recipe["loras"]] == ["lora_all", "dora_rows_layers"]
    assert wrong.status_code == 422
    assert wrong.json()["detail"][0]["loc"] == ["body", "loras"]
    assert "'other'" in wrong.text
