"""API keys: how a key may be sent, and the response to an invalid one. `test_owners.py` tests which routes need one."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.core.settings import Settings
from tests.backends import ToneBackend

KEYS = ("first-key", "id-part:secret-part", "schlüssel")


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    """Returns an application that requires an API key."""
    hashes = [hash_key(key) for key in KEYS]
    tree = {"api": {"key_hashes": hashes}, "output_dir": str(tmp_path_factory.mktemp("outputs"))}
    return create_app(ToneBackend(), Settings.model_validate(tree))


def connect(app: FastAPI, **headers: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", headers=headers)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "Key", "bearer", "KEY"])
async def test_both_schemes_are_accepted_everywhere(locked: FastAPI, scheme: str, key: str) -> None:
    async with connect(locked, Authorization=f"{scheme} {key}".encode()) as client:
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.post("/v1/audio/generate", json={"input": "x", "audio_length": 1})).status_code == 200
        body = {"prompt": "x", "duration": 1}
        assert (await client.post("/v1/audio/generations", json=body)).status_code == 200


@pytest.mark.parametrize("key", KEYS)
async def test_key_may_be_in_a_header_of_its_own(locked: FastAPI, key: str) -> None:
    async with connect(locked, **{"xi-api-key": key.encode()}) as client:
        for path, body in (("/v1/audio/generate", {"input": "x"}), ("/v1/audio/generations", {"prompt": "x"})):
            assert (await client.post(path, json=body)).status_code == 200
    for empty in ("", "Bearer", "Bearer ", "Key"):
        async with connect(locked, **{"xi-api-key": key.encode(), "authorization": empty}) as client:
            assert (await client.get("/v1/user")).status_code == 200
            # This route also takes a key without a scheme.
            assert (await client.get(f"/v2beta/audio/results/{'0' * 32}")).status_code == 404
    async with connect(locked, **{"xi-api-key": f"{key}2".encode()}) as client:
        assert (await client.get("/v1/user")).status_code == 401
        headers = {"Authorization": f"Bearer {key}".encode()}
        assert (await client.get("/v1/user", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "first-key", "Basic first-key", "Bearer first-key2", "Bearer FIRST-KEY", "Key x y"],
)
async def test_other_headers_are_refused(locked: FastAPI, value: str) -> None:
    async with connect(locked, Authorization=value) as client:
        assert (await client.get("/v1/models")).status_code == 401


async def test_the_refusal_has_the_form_of_the_routes_dialect(locked: FastAPI) -> None:
    async with connect(locked) as client:
        vllm = (await client.post("/v1/audio/generate", json={"input": "x"})).json()["error"]
        assert (vllm["code"], vllm["type"], vllm["param"]) == (401, "AuthenticationError", None)
        assert "Authorization" in vllm["message"]
        assert (await client.get("/v1/models")).json()["error"]["code"] == 401
        native = (await client.post("/v1/audio/generations", json={"prompt": "x"})).json()
        assert "Authorization" in native["detail"]
        for url in ("/generate", "/generate/loop", "/riffs/available", "/model/info"):
            saos = await client.request("POST" if url.startswith("/generate") else "GET", url)
            assert "Authorization" in saos.json()["error"]
        assert "Authorization" in (await client.post("/fal-ai/stable-audio", json={"prompt": "x"})).json()["detail"]


async def test_the_key_is_checked_before_the_body_is_parsed(locked: FastAPI) -> None:
    async with connect(locked) as client:
        assert (await client.post("/v1/audio/generate", content=b"{")).status_code == 401


async def test_preflights_need_no_key(locked: FastAPI) -> None:
    headers = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    async with connect(locked, **headers) as client:
        reply = await client.options("/v1/audio/generate")
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer any"}, {"Authorization": "\x00"}])
async def test_without_keys_any_header_is_accepted(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    assert (await client.get("/v1/models", headers=headers)).status_code == 200
    assert (await client.get("/docs", headers=headers)).status_code == 200
