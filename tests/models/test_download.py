"""Downloads from a hub on this machine, in a process of their own because the library reads its settings at import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.hub import COMMIT, Repo, running_hub

pytestmark = pytest.mark.slow

FILES = {
    "model_config.json": b"{}",
    "model.safetensors": b"weights",
    "t5gemma-b-b-ul2/config.json": b"{ }",
    "t5gemma-b-b-ul2/model.safetensors": b"text weights",
    "README.md": b"not needed",
    "other/huge.safetensors": b"not needed",
}
DOWNLOAD = """
import json, sys
from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.download import download_entry
from stable_audio_serve.models.registry import ModelEntry
entry = ModelEntry(name="model", **json.loads(sys.argv[1]))
try:
    print(json.dumps({"folder": str(download_entry(entry))}))
except CheckpointError as error:
    print(json.dumps({"message": error.message}))
"""


def download(tmp_path: Path, *, endpoint: str, repo_id: str = "lab/model", **settings: str) -> dict[str, str]:
    """What downloading gives: the `folder` or an error's `message`. Upper-case settings are environment variables."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hub")}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
    environment |= {key: value for key, value in settings.items() if key.isupper()}
    entry = {"repo_id": repo_id, **{key: value for key, value in settings.items() if not key.isupper()}}
    done = subprocess.run(
        [sys.executable, "-c", DOWNLOAD, json.dumps(entry)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    assert "\n" not in result.get("message", "")
    return result


def test_only_what_is_needed_is_fetched_and_only_once(tmp_path: Path) -> None:
    with running_hub({"lab/model": Repo(FILES, revisions=("main", "v1"))}) as hub:
        first = download(tmp_path, endpoint=hub.url, revision="v1")
        fetched = sorted(hub.fetched)
        again = download(tmp_path, endpoint=hub.url, revision="v1")
        assert sorted(hub.fetched) == fetched
    folder = Path(first["folder"])
    assert folder.name == COMMIT
    assert fetched == sorted(name for name in FILES if name.startswith(("model", "t5gemma")))
    assert (folder / "t5gemma-b-b-ul2" / "model.safetensors").read_bytes() == b"text weights"
    assert again == first


def test_cached_files_serve_without_a_network(tmp_path: Path) -> None:
    with running_hub({"lab/model": Repo(FILES)}) as hub:
        online = download(tmp_path, endpoint=hub.url)
    assert download(tmp_path, endpoint=hub.url) == online  # nobody listens any more
    assert download(tmp_path, endpoint=hub.url, HF_HUB_OFFLINE="1") == online


def test_a_gated_repository_needs_a_token_of_somebody_who_accepted(tmp_path: Path) -> None:
    with running_hub({"lab/model": Repo(FILES, gated=True, token="good")}) as hub:
        refused = download(tmp_path, endpoint=hub.url)
        wrong = download(tmp_path, endpoint=hub.url, HF_TOKEN="bad")
        taken = download(tmp_path, endpoint=hub.url, HF_TOKEN="good")
        page = f"{hub.url}/lab/model"
    for result in (refused, wrong):
        assert "lab/model is gated" in result["message"]
        assert page in result["message"]
        assert "HF_TOKEN" in result["message"]
    assert "folder" in taken


def test_missing_repository(tmp_path: Path) -> None:
    with running_hub({}) as hub:
        message = download(tmp_path, endpoint=hub.url)["message"]
    assert "lab/model does not exist or is private" in message


def test_missing_revision(tmp_path: Path) -> None:
    with running_hub({"lab/model": Repo(FILES)}) as hub:
        message = download(tmp_path, endpoint=hub.url, revision="v9")["message"]
    assert "no revision 'v9'" in message


def test_missing_file(tmp_path: Path) -> None:
    files = {name: content for name, content in FILES.items() if name != "model.safetensors"}
    with running_hub({"lab/model": Repo(files)}) as hub:
        message = download(tmp_path, endpoint=hub.url)["message"]
    assert "lab/model holds no model.safetensors" in message


@pytest.mark.parametrize(("status", "said"), [(403, "was refused (403)"), (500, "answered 500"), (503, "answered 503")])
def test_a_hub_that_refuses(tmp_path: Path, status: int, said: str) -> None:
    with running_hub({"lab/model": Repo(FILES, status=status)}) as hub:
        assert said in download(tmp_path, endpoint=hub.url)["message"]


def test_no_network(tmp_path: Path) -> None:
    message = download(tmp_path, endpoint="http://127.0.0.1:9")["message"]
    assert "cannot be reached" in message
    assert "path" in message


def test_offline_mode_without_a_cache(tmp_path: Path) -> None:
    message = download(tmp_path, endpoint="http://127.0.0.1:9", HF_HUB_OFFLINE="1")["message"]
    assert "HF_HUB_OFFLINE" in message


def test_a_name_that_is_none(tmp_path: Path) -> None:
    message = download(tmp_path, endpoint="http://127.0.0.1:9", repo_id="a/b/c")["message"]
    assert "no valid repository name" in message
