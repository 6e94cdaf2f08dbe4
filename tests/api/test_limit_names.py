"""An error about a limit names what sets the limit: a setting of the server, or the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.catalog import ModelCatalog
from stable_audio_serve.core.settings import Settings
from tests.api.compat.serving import connect_anew, keep_app
from tests.backends import ToneBackend, make_catalog

TEXT = "/v1/audio/generations"


LIMITS = {"max_steps": 9, "max_batch_size": 2, "max_duration_s": 60, "max_deadline_s": 30}


@pytest.fixture(scope="module")
def limited() -> Iterator[tuple[FastAPI, ToneBackend]]:
    with keep_app(api=LIMITS | {"max_upload_bytes": 2000}, jobs={"max_queued": 1}) as limited:
        yield limited


@pytest.mark.parametrize(
    ("path", "fields", "status", "named"),
    [
        (TEXT, {"steps": 10}, 422, "steps must be at most 9 (api.max_steps)"),
        ("/generate", {"steps": 10, "model": "demo"}, 422, "(api.max_steps)"),
        ("/jobs", {"batch_size": 3}, 422, "at most 2 (api.max_batch_size)"),
        (TEXT, {"duration": 61}, 422, "at most 60 (api.max_duration_s)"),
        (TEXT, {"duration": 6, "model": "demo"}, 422, "at most 5 (the model demo)"),
        (TEXT, {"deadline_s": 31}, 422, "at most 30 (api.max_deadline_s)"),
        (TEXT, {"prompt": "x" * 1_100_000}, 413, "1048576 bytes"),
    ],
)
async def test_setting_is_named(
    limited: tuple[FastAPI, ToneBackend], path: str, fields: dict[str, Any], status: int, named: str
) -> None:
    async with connect_anew(limited) as (client, _):
        reply = await client.post(path, json={"prompt": "x", **fields})
    assert reply.status_code == status
    assert named in reply.text


async def test_model_is_named_if_it_is_stricter(client: httpx.AsyncClient) -> None:
    reply = await client.post(TEXT, json={"prompt": "x", "duration": 121})
    assert (reply.status_code, "at most 120 (the model small-sfx)" in reply.text) == (422, True)


async def test_settings_of_queues_and_uploads_are_named(limited: tuple[FastAPI, ToneBackend]) -> None:
    async with connect_anew(limited) as (client, _):
        assert (await client.post("/jobs", json={"prompt": "x"})).status_code == 202
        reply = await client.post("/jobs", json={"prompt": "x"})
        assert (reply.status_code, "(jobs.max_queued)" in reply.text) == (503, True)
        for path in ("/v1/audio/variations", "/generate/style-transfer"):
            files = {"audio": b"x" * 3000, "audio_file": b"x" * 3000}
            reply = await client.post(path, data={"prompt": "x"}, files=files)
            assert (reply.status_code, "2000 bytes (api.max_upload_bytes)" in reply.text) == (413, True)


@pytest.mark.parametrize(("limits", "most", "unset"), [({}, 100, 100), ({"max_steps": 20}, 20, 20)])
async def test_models_default_steps_are_allowed_without_a_setting(
    tmp_path: Any, limits: dict[str, int], most: int, unset: int
) -> None:
    backend = ToneBackend(ModelCatalog([replace(make_catalog().default, default_steps=100)]))
    settings = Settings.model_validate({"output_dir": str(tmp_path), "api": limits})
    app = create_app(backend, settings)
    body = {"prompt": "x", "duration": 0.1}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        assert (await client.post(TEXT, json=body)).status_code == 200
        assert backend.last.steps == unset
        assert (await client.post(TEXT, json=body | {"steps": most})).status_code == 200
        refused = await client.post(TEXT, json=body | {"steps": most + 1})
        assert (refused.status_code, f"at most {most} (api.max_steps)" in refused.text) == (422, True)
        assert (await client.get("/health")).json()["max_steps"] == most
        (model,) = (await client.get("/v1/models")).json()["data"]
        assert (model["default_steps"], model["max_steps"]) == (100, most)
