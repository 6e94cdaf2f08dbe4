"""Adapters with a real server: loaded by command, used by requests and jobs, and kept over a restart."""

from __future__ import annotations

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


def test_loaded_adapters_are_used_and_kept_over_a_restart(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"root:{hash_key('root')} scope=admin,jobs,generate\n")
    (tmp_path / "keys").chmod(0o600)
    folder = tmp_path / "adapters"
    folder.mkdir()
    args = {
        "models": [model("tiny", lora_folder="adapters")],
        "output_dir": str(tmp_path / "out"),
        "api": {"key_file": str(tmp_path / "keys")},
    }
    config = write_config(tmp_path, args)
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
