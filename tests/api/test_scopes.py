"""Scopes of keys: every operation of the API with a key of each scope."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.keys import SCOPES, hash_key
from stable_audio_serve.core.settings import Settings
from tests.api.prefixes import PREFIXES
from tests.backends import ToneBackend

pytestmark = pytest.mark.server

# ANY: operations that every key may call. OPEN: operations that need no key. All others need a scope.
ANY = {"/v1/models", "/loras", "/riffs/available", "/model/info", "/v1/user", "/v1/user/account", "/v1/user/balance"}
ANY |= {"/v1/status", "/api/fal/proxy"}  # the route to which the proxy forwards a request checks the scope
OPEN = {"/", "/health", "/ready", "/saos/health", "/files/{file_id}/{file_name}", "/jobs/{job_id}/audio"}
OPEN |= {"/llms.txt", "/api/openapi/queue/openapi.json", "/models/{endpoint_id}/llms.txt", "/storage/upload/{ticket}"}
OPEN |= {"/playground/{path}", "/openapi.json", "/docs", "/redoc", "/docs/assets/{file_name}"}
ADMIN = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
STORAGE = {"/storage/auth/token", "/storage/upload/initiate", "/files/upload"}
GENERATE = {"/generate", "/generate/loop", "/generate/style-transfer", "/generate/loop-with-riff"}
GENERATE |= {f"/v1/audio/{what}" for what in ("generations", "variations", "inpaint", "generate", "replay")}
GENERATE |= {"/fal-ai/stable-audio", "/run/fal-ai/stable-audio"}
GENERATE |= {"/fal-ai/{app}/{endpoint}", "/run/fal-ai/{app}/{endpoint}"}
GENERATE |= {"/v1/sound-generation", "/v1/music", "/v1/music/stream"}
GENERATE |= {f"/v2beta/audio/stable-audio-2/{what}" for what in ("text-to-audio", "audio-to-audio", "inpaint")}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    """Returns an application with one key per scope, a key with all scopes and two keys that name no scope.

    The text of a scope's key is the name of the scope.
    """
    folder = tmp_path_factory.mktemp("scopes")
    lines = [f"{scope}:{hash_key(scope)} scope={scope}" for scope in SCOPES]
    lines += [f"all:{hash_key('all')} scope={','.join(SCOPES)}", f"plain:{hash_key('plain')}"]
    (folder / "keys").write_text("\n".join(lines))
    api = {"key_hashes": [hash_key("old")], "key_file": str(folder / "keys")}
    return create_app(ToneBackend(), Settings.model_validate({"api": api, "output_dir": str(folder)}))


def connect(app: FastAPI, key: str) -> httpx.AsyncClient:
    headers = {"Authorization": f"Key {key}"}
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", headers=headers)


def operations(app: FastAPI) -> Iterator[tuple[str, str, str]]:
    ids = {"job_id": "0" * 32, "file_id": "0" * 32, "ticket": "a.b", "number": "1"}
    ids |= {"app": "stable-audio-3", "endpoint": "medium/text-to-audio"}
    for path, methods in app.openapi()["paths"].items():
        for method in methods:
            yield method.upper(), path, re.sub(r"{(\w+)}", lambda match: ids.get(match[1], match[1]), path)


def may_use(path: str, key: str) -> bool:
    """Whether `key` may call the operation at `path`. A key that is named like a scope has that scope."""
    if path in ANY | OPEN:
        return True
    if path in STORAGE:
        return key != "admin"
    if path.startswith("/v1/admin/") or path in ADMIN:
        return key in {"all", "admin"}
    return key in {"all", "plain", "old", "generate" if path in GENERATE else "jobs"}


@pytest.mark.parametrize("key", [*SCOPES, "all", "plain", "old"])
async def test_every_operation_needs_its_scope(app: FastAPI, key: str) -> None:
    prefixes = ("", *(PREFIXES if key in ("generate", "jobs") else ()))
    paths = {re.sub(r":\w+}", "}", found.path or "") for found in iter_route_contexts(app.routes)}
    async with connect(app, key) as client:
        for method, path, url in operations(app):
            for prefix in (prefix for prefix in prefixes if prefix + path in paths):
                reply = await client.request(method, prefix + url)
                if prefix and reply.status_code in (404, 405):
                    continue
                is_refused = reply.status_code == 403 and "scope" in reply.text
                assert is_refused is not may_use(path, key), (method, prefix + path, reply.text)
                if is_refused:
                    assert reply.headers["content-type"] == "application/json"
                    assert re.search("generate|jobs|admin", reply.text)


async def test_fal_host_decides_the_scope_of_a_submission(app: FastAPI) -> None:
    body = {"prompt": "x", "seconds_total": 1}
    queue = {"Host": "queue.localhost"}
    for key, now, later in (("generate", 200, 403), ("jobs", 403, 200)):
        async with connect(app, key) as client:
            assert (await client.post("/fal-ai/stable-audio", json=body)).status_code == now
            assert (await client.post("/fal-ai/stable-audio", json=body, headers=queue)).status_code == later
            for host, expected in (("fal.run", now), ("queue.fal.run", later)):
                target = {"x-fal-target-url": f"https://{host}/fal-ai/stable-audio"}
                reply = await client.post("/api/fal/proxy", json=body, headers=target)
                assert reply.status_code == expected, (key, host)


async def test_scope_is_checked_before_the_body(app: FastAPI) -> None:
    async with connect(app, "jobs") as client:
        assert (await client.post("/v1/audio/generate", content=b"{")).status_code == 403


async def test_refusal_names_the_scope_in_each_dialects_format(app: FastAPI) -> None:
    async with connect(app, "admin") as client:
        native = (await client.post("/v1/audio/generations", json={"prompt": "x"})).json()
        assert "generate" in native["detail"]
        small = (await client.post("/saos/generate", json={"prompt": "x"})).json()
        assert "generate" in small["error"]
        vllm = (await client.post("/v1/audio/generate", json={"input": "x"})).json()["error"]
        assert (vllm["code"], vllm["type"]) == (403, "PermissionDeniedError")
        aiml = (await client.post("/v2/generate/audio", json={"model": "stable-audio", "prompt": "x"})).json()
        assert aiml["statusCode"] == 403
        assert "jobs" in aiml["message"]
        stability = await client.post("/v2beta/audio/stable-audio/text-to-audio", data={"prompt": "x"})
        assert (stability.status_code, stability.json()["name"]) == (403, "forbidden")
        elevenlabs = await client.post("/v1/sound-generation", json={"text": "x"})
        assert (elevenlabs.status_code, elevenlabs.json()["detail"]["status"]) == (403, "missing_permissions")
        fal = await client.post("/queue/fal-ai/stable-audio", json={"prompt": "x"})
        assert fal.json()["error_type"] == "forbidden"
        assert fal.headers["x-fal-error-type"] == "forbidden"
