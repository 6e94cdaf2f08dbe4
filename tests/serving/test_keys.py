"""API keys on a real server with two HTTP processes, which share the limits of a key. Also changes of the key file."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from stable_audio_serve.core.keys import hash_key
from tests.patience import PATIENCE_S, wait_until
from tests.serving.conftest import model
from tests.serving.launched import LaunchedServer, write_config

pytestmark = [pytest.mark.server, pytest.mark.slow]

_LIMITED = f"alice:{hash_key('alice')} audio-seconds-per-minute=20\n"
_OTHERS = f"bob:{hash_key('bob')}\nops:{hash_key('ops')} scope=admin\n"


def put(folder: Path, text: str) -> None:
    (folder / "new").write_text(text)
    os.replace(folder / "new", folder / "keys")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    put(folder, _LIMITED + _OTHERS)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LaunchedServer]:
    args = {
        "models": [model("tiny", max_queue_s=1e6)],
        "ingress": {"replicas": 2},
        "api": {"key_file": "keys"},
    }
    launched = LaunchedServer(write_config(folder, args)).wait_until_ready()
    yield launched
    launched.stop(number=signal.SIGKILL)


def ask(server: LaunchedServer, key: str) -> httpx.Response:
    """Send a request with this key on a new connection, so that any of the HTTP processes may get it."""
    body = {"prompt": "rain", "duration": 1, "steps": 1}
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/audio/generations", json=body, headers=headers, timeout=PATIENCE_S)


def ask_many(server: LaunchedServer, key: str, number: int) -> Sequence[httpx.Response]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda _: ask(server, key), range(number)))


def test_two_ingress_processes_share_a_limit(server: LaunchedServer) -> None:
    began_at = time.monotonic()
    replies = ask_many(server, "alice", 60)
    assert len(server.pids("ray::ServeReplica:audio:Ingress")) == 2
    statuses = [reply.status_code for reply in replies]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) == 20 or time.monotonic() - began_at > 59
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert 1 <= int(refused.headers["retry-after"]) <= 61
    assert ask(server, "bob").status_code == 200


def test_removed_key_fails_everywhere_and_broken_file_is_ignored(server: LaunchedServer, folder: Path) -> None:
    assert ask(server, "bob").status_code == 200
    put(folder, _OTHERS.replace("bob", "carol"))
    assert ask(server, "ops").status_code == 403
    wait_until(lambda: {reply.status_code for reply in ask_many(server, "alice", 16)} == {401})
    put(folder, "sas-a-plain-key-by-mistake\n")
    broken = wait_until(lambda: (file := server.client.get("/health").json()["key_file"])["state"] == "broken" and file)
    assert broken["reason"].startswith("line 1: ")  # in the same answer, because the other process may not know it yet
    assert ask(server, "bob").status_code == 200  # bob's key stayed valid under the name "carol"
    assert not re.search(r"by-mistake|Bearer (?!\$KEY)", server.output)  # the ready line shows how to send a key
