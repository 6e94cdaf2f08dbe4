"""The client name under which a request waits in a model's queue."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.core.settings import ApiSettings, Settings
from tests.api.compat.serving import make_client
from tests.api.test_jobs import submit, wait
from tests.backends import ToneBackend

_BODY = {"prompt": "rain", "input": "rain", "duration": 1}
_HEADER = "X-Stable-Audio-Address"


async def find_client(
    folder: Path,
    *,
    address: str = "192.0.2.7",
    path: str = "/generate",
    address_header: str | None = None,
    headers: dict[str, str] | None = None,
    **api: object,
) -> str:
    """Returns the client name that the model receives."""
    backend = ToneBackend()
    settings = Settings(output_dir=str(folder), api=ApiSettings.model_validate(api))
    app = create_app(backend, settings, address_header=address_header)
    transport = httpx.ASGITransport(app, client=(address, 40_000))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
        answer = await client.post(path, json=_BODY)
        assert answer.status_code == 200, answer.text
    await app.state.limiter.close()
    ((_, request),) = backend.requests
    return request.client


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
    ],
)
async def test_without_keys_the_client_is_its_address(tmp_path: Path, address: str, client: str) -> None:
    assert await find_client(tmp_path, address=address) == client


async def test_proxy_header_sets_the_address_and_clients_cannot(tmp_path: Path) -> None:
    headers = {_HEADER: "198.51.100.1", "X-Forwarded-For": "198.51.100.2", "Forwarded": "for=198.51.100.3"}
    assert await find_client(tmp_path, headers=headers) == "192.0.2.7"
    assert await find_client(tmp_path, headers=headers, address_header=_HEADER) == "198.51.100.1"
    assert await find_client(tmp_path, address_header=_HEADER) == "192.0.2.7"


@pytest.mark.parametrize("path", ["/generate", "/v1/audio/generations", "/v1/audio/generate"])
async def test_with_keys_the_client_is_the_keys(tmp_path: Path, path: str) -> None:
    headers = {"Authorization": "Bearer secret", _HEADER: "198.51.100.1"}
    key_hashes = [f"alice:{hash_key('secret')}"]
    assert await find_client(tmp_path, path=path, headers=headers, key_hashes=key_hashes) == "alice"


async def test_jobs_count_for_the_client_that_submitted_them() -> None:
    async with make_client(api={"key_hashes": [f"alice:{hash_key('secret')}"]}) as (client, backend):
        client.headers["Authorization"] = "Bearer secret"
        await wait(client, await submit(client))
        assert backend.last.client == "alice"
