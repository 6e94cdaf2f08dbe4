from __future__ import annotations

from typing import Any

import httpx
import pytest

from docs.reference import describe_api
from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.catalog import OPEN_FAMILY, ModelCard, ModelCatalog
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.jobs.queue import JobQueue
from tests.backends import ToneBackend, make_catalog

CONTRACT_KEYS = {
    "status",
    "model",
    "device",
    "loaded",
    "storage_backend",
    "available_models",
    "loaded_models",
    "preload_models",
    "model_duration_limits_seconds",
    "max_duration_seconds",
    "max_steps",
    "max_batch_size",
}


async def test_health_has_the_fields_of_the_contract(client: httpx.AsyncClient) -> None:
    reply = await client.get("/health")
    assert reply.status_code == 200
    body = reply.json()
    assert set(body) >= CONTRACT_KEYS
    assert body["status"] == "ok"
    assert body["healthy"] is body["loaded"] is body["model_loaded"] is True
    assert body["model"] == "small-sfx"
    assert body["device"] == "cpu"
    assert body["storage_backend"] == "local"
    assert body["available_models"] == ["small-sfx", "small-music", "medium", "demo"]
    assert body["loaded_models"] == ["small-sfx"]
    assert body["preload_models"] == ["small-sfx"]
    limits = {"small-sfx": 120.0, "small-music": 120.0, "medium": 380.0, "demo": 5.0}
    assert body["model_duration_limits_seconds"] == limits
    assert (body["max_duration_seconds"], body["max_steps"], body["max_batch_size"]) == (380.0, 50, 4)
    assert body["model_info"] == {"sample_rate": 44100, "sample_size": 524_288, "diffusion_objective": "rf_denoiser"}
    assert body["models"]["demo"]["demo"] is True
    assert body["models"]["medium"]["demo"] is False


async def test_health_describes_the_model_of_the_open_small_routes(jobs: JobQueue) -> None:
    card = ModelCard("open", OPEN_FAMILY, max_duration_s=6.0, objective="rectified_flow")
    backend = ToneBackend(ModelCatalog([*make_catalog(), card]))
    transport = httpx.ASGITransport(create_app(backend, Settings(), jobs=jobs))
    expected = {"sample_rate": 44100, "sample_size": 264_600, "diffusion_objective": "rectified_flow"}
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        for path in ("/health", "/saos/health"):
            assert (await client.get(path)).json()["model_info"] == expected


@pytest.mark.parametrize("url", ["/health", "/sa3/health", "/saos/health"])
async def test_probes_can_use_head(client: httpx.AsyncClient, url: str) -> None:
    reply, head = await client.get(url), await client.head(url)
    assert (head.status_code, head.headers["content-length"]) == (reply.status_code, reply.headers["content-length"])


async def test_health_follows_the_settings(jobs: JobQueue) -> None:
    settings = Settings.model_validate(
        {
            "api": {"max_duration_s": 60, "max_steps": 9, "max_batch_size": 2},
            "device": "cuda",
            "preload_models": ["stable-audio-3-medium"],
            "storage": {"bucket": "b"},
        }
    )
    transport = httpx.ASGITransport(create_app(ToneBackend(statuses={}), settings, jobs=jobs))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        body = (await client.get("/health")).json()
    assert (body["device"], body["preload_models"], body["storage_backend"]) == ("cuda", ["medium"], "s3")
    assert body["model_duration_limits_seconds"]["medium"] == 60
    assert body["max_steps"] == 9


@pytest.mark.parametrize(
    ("prefix", "owner"), [("", "stable-audio-serve"), ("/sa3", "stable-audio-serve"), ("/vllm", "vllm")]
)
async def test_models_are_listed_in_openais_format(client: httpx.AsyncClient, prefix: str, owner: str) -> None:
    body = (await client.get(f"{prefix}/v1/models")).json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == ["small-sfx", "small-music", "medium", "demo"]
    for model in body["data"]:
        assert model["object"] == "model"
        assert isinstance(model["created"], int)
        assert model["owned_by"] == owner
        assert model["root"] == model["id"]
        assert {"parent", "max_model_len", "permission"} <= set(model)
    assert [model["is_demo"] for model in body["data"]] == [False, False, False, True]
    assert body["data"][2]["max_duration_s"] == 380.0


async def test_openapi_page_describes_errors_and_fields(client: httpx.AsyncClient) -> None:
    document: dict[str, Any] = (await client.get("/openapi.json")).json()
    described = {tag["name"] for tag in document["tags"]}
    ticket = "/storage/upload/{ticket}"
    public = {
        "/",
        "/health",
        "/ready",
        "/saos/health",
        "/files/{file_id}/{file_name}",
        "/jobs/{job_id}/audio",
        ticket,
        f"{ticket}/{{number}}",
        f"{ticket}/complete",
        "/playground/{path}",
        *("/docs", "/docs/assets/{file_name}", "/redoc", "/openapi.json", "/llms.txt"),
        *("/api/openapi/queue/openapi.json", "/models/{endpoint_id}/llms.txt"),
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert len(operation["tags"]) == 1
            assert set(operation["tags"]) <= described
            own_errors = {"422"} & set(operation["responses"])
            assert not any("HTTPValidationError" in str(operation["responses"][status]) for status in own_errors)
            assert ("401" in operation["responses"]) is not (path in public)
    schemas = document["components"]["schemas"]
    for name in ("GenerationBody", "VariationForm", "InpaintForm"):
        for field, schema in schemas[name]["properties"].items():
            assert schema.get("description"), f"{name}.{field}"
    assert schemas["GenerationBody"]["examples"]
    assert "default" not in schemas["GenerationBody"]["properties"]["model"]
    variation = document["paths"]["/v1/audio/variations"]["post"]
    assert set(variation["requestBody"]["content"]) == {"multipart/form-data"}
    assert {"200", "400", "413", "422", "503", "504"} <= set(variation["responses"])
    for path, name in (("/health", "Health"), ("/v1/models", "ModelList")):
        answer = document["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        assert answer["$ref"].endswith(name)
    assert (await client.get("/docs")).status_code == 200


def test_make_docs_writes_the_same_description() -> None:
    assert describe_api() == create_app(ToneBackend(), Settings()).openapi()
