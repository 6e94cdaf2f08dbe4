"""The file with the API keys is read again when it changes. If the new file is faulty, the old keys stay valid."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from stable_audio_serve.api.app import create_app
from stable_audio_serve.api.middleware import key_ring
from stable_audio_serve.api.middleware.key_ring import KeyFileHealth, KeyRing
from stable_audio_serve.api.service import Service
from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.core.settings import ApiSettings, Settings
from tests.backends import ToneBackend
from tests.factories import FakeClock
from tests.patience import PATIENCE_S
from tests.recorded_metrics import RecordedMetrics

pytestmark = pytest.mark.server


class Site:
    """An application with a key file and a fake clock."""

    def __init__(self, folder: Path, text: str | None) -> None:
        self.file = folder / "keys"
        if text is not None:
            self.write(text)
        self.clock = FakeClock()
        settings = Settings(api=ApiSettings(key_file=str(self.file)), output_dir=str(folder / "outputs"))
        self.app: FastAPI = create_app(ToneBackend(), settings)
        self.metrics = RecordedMetrics()
        self.app.state.keys.ring = self.ring = KeyRing(settings.api, metrics=self.metrics, clock=self.clock)

    def write(self, text: str) -> None:
        """Replace the key file atomically, as operators are advised to do."""
        (new := self.file.with_suffix(".new")).write_text(text)
        os.replace(new, self.file)

    async def ask(self, key: str | None, path: str = "/v1/models") -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
            return await client.get(path)

    async def statuses(self, *keys: str) -> list[int]:
        """Advance the clock by two seconds, then send a request with each key. Returns the status codes."""
        self.clock.now += 2
        return [(await self.ask(key)).status_code for key in keys]


def lines(*names: str) -> str:
    return "".join(f"{name}:{hash_key(name)}\n" for name in names)


async def test_keys_change_with_the_file(tmp_path: Path) -> None:
    site = Site(tmp_path, lines("alice", "bob"))
    assert await site.statuses("alice", "bob", "carol") == [200, 200, 401]
    site.write(lines("alice", "carol"))
    assert await site.statuses("alice", "bob", "carol") == [200, 401, 200]
    site.write("# nobody\n")
    assert await site.statuses("alice", "bob", "carol") == [401, 401, 401]


async def test_updated_kubernetes_secret_is_read(tmp_path: Path) -> None:
    for number, names in enumerate((["alice"], ["carol"])):
        (folder := tmp_path / f"..{number}").mkdir()
        (folder / "keys").write_text(lines(*names))
        os.utime(folder / "keys", (1, 1))  # the old and the new file have the same size and date
    (tmp_path / "..data").symlink_to("..0")
    (tmp_path / "keys").symlink_to("..data/keys")
    site = Site(tmp_path, None)
    assert await site.statuses("alice", "carol") == [200, 401]
    (tmp_path / "..tmp").symlink_to("..1")
    os.replace(tmp_path / "..tmp", tmp_path / "..data")
    shutil.rmtree(tmp_path / "..0")
    assert await site.statuses("alice", "carol") == [401, 200]


@pytest.mark.parametrize("bad", ["", "alice", "alice:sas-plain-key\n", f"a:{'0' * 64}\nb:{'0' * 64}\n", None])
async def test_faulty_file_changes_no_key_and_is_reported(
    tmp_path: Path, bad: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    site = Site(tmp_path, lines("alice"))
    if bad is None:
        site.file.unlink()
    else:
        site.write(bad)
    assert await site.statuses("alice", "bob") == [200, 401]
    assert await site.statuses("alice", "bob") == [200, 401]
    health = (await site.ask(None, "/health")).json()["key_file"]
    assert health["state"] == "broken"
    assert str(tmp_path) not in health["reason"]
    assert site.metrics.gauges == {"key_file_broken": 1.0}
    logged = capsys.readouterr().out
    assert logged.count("key file cannot be used") == 1
    assert "plain" not in health["reason"] + logged
    site.write(lines("alice"))  # the file before the fault
    assert await site.statuses("alice", "bob") == [200, 401]
    assert capsys.readouterr().out.count("key file read") == 1
    site.write(lines("bob"))
    assert await site.statuses("alice", "bob") == [401, 200]
    assert (await site.ask(None, "/health")).json()["key_file"] == {"state": "ok", "reason": None}
    assert site.metrics.gauges == {"key_file_broken": 0.0}


async def test_health_route_detects_a_faulty_file(tmp_path: Path) -> None:
    site = Site(tmp_path, lines("alice"))
    site.write("x")
    site.clock.now += 2
    assert (await site.ask(None, "/health")).json()["key_file"]["state"] == "broken"


async def test_server_started_with_a_faulty_file_refuses_every_request(tmp_path: Path) -> None:
    site = Site(tmp_path, None)
    for key in (None, "alice"):
        reply = await site.ask(key)
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
    ready = await site.ask(None, "/ready")
    assert ready.status_code == 503
    assert any("key file" in reason for reason in ready.json()["reasons"])
    site.write(lines("alice"))
    assert await site.statuses("alice", "bob") == [200, 401]
    assert (await site.ask(None, "/ready")).status_code == 200


async def test_many_requests_read_the_file_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path, lines("alice"))
    reads = []
    read = key_ring.read_key_file
    monkeypatch.setattr(key_ring, "read_key_file", lambda path: (reads.append(path), read(path))[1])
    for _ in range(3):
        site.clock.now += 1.5
        assert {reply.status_code for reply in await asyncio.gather(*(site.ask("wrong") for _ in range(30)))} == {401}
    assert len(reads) == 3


async def test_hanging_disk_does_not_block_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path, lines("alice"))
    answers = threading.Event()
    monkeypatch.setattr(key_ring, "read_key_file", lambda _: answers.wait(PATIENCE_S) and b"x")
    try:
        assert await site.statuses("alice") == [200]  # waits 0.5 s for the file, then uses the previous keys
        site.clock.now += 20
        assert site.ring.health == KeyFileHealth("broken", "the file does not answer")
        before = asyncio.get_running_loop().time()
        assert {reply.status_code for reply in await asyncio.gather(*(site.ask("alice") for _ in range(50)))} == {200}
        assert asyncio.get_running_loop().time() - before < 20  # it would be 25 s if each request waited 0.5 s
    finally:
        answers.set()


def test_startup_refuses_a_faulty_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("x")
    with pytest.raises(ConfigError, match=r"^api.key_file \(STABLE_AUDIO_API_KEY_FILE\): .*/keys: line 1: must be"):
        key_ring.check_key_file(str(tmp_path / "keys"))
    with pytest.raises(ConfigError, match="/other: it cannot be read: No such file"):
        key_ring.check_key_file(str(tmp_path / "other"))
    key_ring.check_key_file(None)


def test_server_with_a_key_file_has_keys(tmp_path: Path) -> None:
    assert ApiSettings(key_file="keys").has_keys
    assert not ApiSettings().has_keys
    service = Service(ToneBackend(), Settings(output_dir=str(tmp_path)))
    assert service.keys.ring.is_open
