"""Adapters on a real server: loaded with a command, used by requests and jobs, and still loaded after a restart."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from stable_audio_serve.core.keys import hash_key
from tests.audio_files import pcm_of
from tests.patience import wait_until
from tests.serving.conftest import TINY, model
from tests.serving.launched import LaunchedServer, write_config

pytestmark = [pytest.mark.server, pytest.mark.slow]

FILE = Path(TINY) / "lora" / "lora_all.safetensors"
BODY = {"prompt": "a door closes", "duration": 1, "seed": 5, "steps": 2}


def start(config: Path) -> LaunchedServer:
    launched = LaunchedServer(config)
    launched.wait_until_ready()
    launched.client.headers["Authorization"] = "Bearer root"
    return launched


def generate(server: LaunchedServer, **fields: Any) -> httpx.Response:
    return server.client.post("/v1/audio/generations", json={**BODY, **fields})


def names(server: LaunchedServer) -> list[str]:
    entries = server.client.get("/v1/models").raise_for_status().json()["data"]
    return [entry["id"] for entry in entries if entry["parent"]]


def configure(tmp_path: Path, **settings: Any) -> Path:
    """Write the configuration of a server with the model `tiny` and a key with all scopes. Returns the file's path."""
    (tmp_path / "keys").write_text(f"root:{hash_key('root')} scope=admin,jobs,generate\n")
    (tmp_path / "keys").chmod(0o600)
    args = {
        "models": [model("tiny", **settings)],
        "output_dir": str(tmp_path / "out"),
        "api": {"key_file": str(tmp_path / "keys")},
    }
    return write_config(tmp_path, args)


def test_loaded_adapters_are_used_and_kept_over_a_restart(tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    config = configure(tmp_path, lora_folder="adapters")
    server = start(config)
    try:
        plain = generate(server).raise_for_status()
        assert names(server) == []
        body = {"lora_name": "vinyl", "lora_path": str(FILE)}
        assert server.client.post("/v1/load_lora_adapter", json=body).status_code == 200
        (folder / "bells.safetensors").write_bytes(FILE.read_bytes())
        wait_until(lambda: names(server) == ["tiny:bells", "tiny:vinyl"])
        changed = generate(server, model="tiny:vinyl").raise_for_status()
        assert pcm_of(changed.content) != pcm_of(plain.content)
        job = server.client.post("/jobs", json={**BODY, "loras": [{"name": "bells"}]}).raise_for_status().json()["id"]
        wait_until(lambda: server.client.get(f"/jobs/{job}").json()["status"] == "succeeded")
        assert pcm_of(server.client.get(f"/jobs/{job}/audio").content) == pcm_of(changed.content)
    finally:
        server.stop()
    server = start(config)
    try:
        assert names(server) == ["tiny:bells", "tiny:vinyl"]
        again = generate(server, model="tiny:vinyl").raise_for_status()
        assert pcm_of(again.content) == pcm_of(changed.content)
        assert server.client.post("/v1/unload_lora_adapter", json={"lora_name": "vinyl"}).status_code == 200
        assert names(server) == ["tiny:bells"]
        assert generate(server, model="tiny:vinyl").status_code == 422
    finally:
        server.stop()


def test_a_killed_replica_changes_no_adapter_of_an_answer(tmp_path: Path) -> None:
    """One of two replicas is killed while requests with four sets of adapters run.

    In strict mode, a repeated request must return the same bytes.
    """
    config = configure(tmp_path, mode="strict", replicas={"min_replicas": 2, "max_replicas": 2})
    bodies: list[dict[str, Any]] = [
        {},
        {"loras": [{"name": "vinyl"}]},
        {"loras": [{"name": "bells", "strength": 0.5}]},
        {"loras": [{"name": "bells"}, {"name": "vinyl", "strength": -1, "interval": [0.3, 1]}]},
    ]
    server = start(config)
    try:
        for name, file in (("vinyl", FILE), ("bells", FILE.with_name("dora_rows_layers.safetensors"))):
            body = {"lora_name": name, "lora_path": str(file)}
            server.client.post("/v1/load_lora_adapter", json=body).raise_for_status()
        expected = [pcm_of(generate(server, **body).raise_for_status().content) for body in bodies]
        assert len(set(expected)) == len(bodies)
        wait_until(lambda: len(server.pids("ServeReplica:audio:tiny")) == 2)
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(generate, server, **bodies[index % 4]) for index in range(80)]
            wait_until(lambda: sum(each.done() for each in asked) >= 20)
            os.kill(server.pids("ServeReplica:audio:tiny")[0], signal.SIGKILL)
            answers = [each.result() for each in asked]
        assert {answer.status_code for answer in answers} == {200}
        assert [pcm_of(answer.content) for answer in answers] == expected * 20
    finally:
        server.stop()
