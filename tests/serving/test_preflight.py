"""If a model cannot be used, the server prints an error of one sentence and exits within seconds, before Ray starts."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.models.stable_audio_tools import package
from stable_audio_serve.serving.placement import Plan, describe_models, plan_deployments
from stable_audio_serve.serving.preflight import (
    describe_downloads,
    entries_to_download,
    fetch_configs,
    require_weights,
)
from tests.goldens import OPEN_GOLDENS
from tests.models.hub import Repo, checkpoint_files, fill_cache, pointing_library_at, running_hub, silent_hub
from tests.patience import PATIENCE_S
from tests.serving.conftest import TINY
from tests.serving.launched import command, free_port, write_config

HUB_MODEL = {"name": "lab", "repo_id": "lab/model"}


def refusal(folder: Path, models: list[Mapping[str, Any]], **variables: str) -> str:
    """Start a server with these models, which must fail to start. Return what it prints."""
    result = subprocess.run(
        command(write_config(folder, {"models": models}), "--port", str(free_port())),
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.getcwd(), "HF_HOME": str(folder / "hub")} | variables,
        timeout=PATIENCE_S,
        check=False,
    )
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = (line for line in result.stderr.splitlines() if not line.startswith("configuration: "))
    assert not (folder / "outputs").exists()
    return line


@pytest.mark.server
def test_gated_repository_stops_startup(tmp_path: Path) -> None:
    with running_hub({"lab/model": Repo({"model_config.json": b"{}", "model.safetensors": b""}, True, "good")}) as hub:
        line = refusal(tmp_path, [HUB_MODEL], HF_ENDPOINT=hub.url, HF_TOKEN="bad")
    assert line.startswith(f"error: model lab: lab/model is gated: accept its terms at {hub.url}/lab/model")


@pytest.mark.slow
def test_silent_hub_stops_startup_soon(tmp_path: Path) -> None:
    with silent_hub() as url:
        line = refusal(tmp_path, [HUB_MODEL], HF_ENDPOINT=url)
    assert line.startswith("error: model lab: lab/model is not complete in ")
    assert f"{url} cannot be reached" in line


def test_models_to_download_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    plan = make_plan(HUB_MODEL, {"name": "tiny", "path": TINY}, {"name": "demo"})
    entries = entries_to_download(plan.settings.models)
    assert list(entries) == ["lab"]
    assert describe_downloads(entries) == "lab: 0.00 GB"
    folder = tmp_path / "models--lab--model"
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "89ab"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(blobs / "0123")
    copied = snapshot / "model_config.json"  # on a file system without links, the cache has its files here
    for path, megabytes in ((blobs / "0123", 30), (blobs / "4567.incomplete", 20), (copied, 40)):
        with path.open("wb") as file:
            file.truncate(megabytes * 1_000_000)
    assert describe_downloads(entries) == "lab: 0.09 GB"


def test_missing_folder_stops_startup(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"model tiny: .*{tmp_path}/absent"):
        check(make_plan({"name": "tiny", "path": str(tmp_path / "absent")}), print_error=pytest.fail)


@pytest.mark.slow
def test_missing_network_stops_startup(tmp_path: Path) -> None:
    line = refusal(tmp_path, [HUB_MODEL], HF_ENDPOINT="http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in line


def check(plan: Plan, *, print_error: Callable[[str], Any]) -> None:
    require_weights(plan, plan.settings.models, print_error=print_error)


def make_plan(*models: Mapping[str, Any], **settings: Any) -> Plan:
    return plan_deployments(Settings.model_validate({"models": models, **settings}))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("model.safetensors", "holds no weights; expected model.safetensors"),
        ("model_config.json", "model_config.json does not exist"),
        ("t5gemma/config.json", "the text encoder was not found"),
        ("t5gemma/model.safetensors", "t5gemma holds no model.safetensors"),
        ("t5gemma/tokenizer.json", "t5gemma holds no tokenizer.json"),
    ],
)
def test_folder_without_a_file_stops_startup(tmp_path: Path, lost: str, message: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    (folder / lost).unlink()
    plan = make_plan({"name": "mine", "path": str(folder)})
    with pytest.raises(CheckpointError) as caught:
        check(plan, print_error=pytest.fail)
    assert caught.value.message.startswith("model mine: ")
    assert str(folder) in caught.value.message
    assert message in caught.value.message


def test_truncated_weights_stop_the_start(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    os.truncate(folder / "model.safetensors", 100_000)
    with pytest.raises(CheckpointError, match=r"model mine: .*is corrupt or incomplete"):
        check(make_plan({"name": "mine", "path": str(folder)}), print_error=pytest.fail)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "t5gemma/model.safetensors"])
def test_weights_cloned_without_git_lfs_stop_the_start(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    if name == "model.ckpt":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer"):
        check(make_plan({"name": "mine", "path": str(folder)}), print_error=pytest.fail)


def test_model_not_loaded_at_the_start_only_warns(tmp_path: Path) -> None:
    tiny, absent = {"name": "tiny", "path": TINY}, {"name": "absent", "path": str(tmp_path / "absent")}
    warnings: list[str] = []
    check(make_plan(tiny, absent), print_error=warnings.append)
    (warning,) = warnings
    assert warning.startswith("warning: model absent cannot be loaded: ")
    assert str(tmp_path / "absent") in warning
    for kept in ({"preload_models": ["absent"]}, {"default_model": "absent"}):
        with pytest.raises(CheckpointError, match="model absent: "):
            check(make_plan(tiny, absent, **kept), print_error=pytest.fail)
    with pytest.raises(CheckpointError, match="model absent: "):
        check(make_plan(tiny, absent | {"replicas": {"min_replicas": 1}}), print_error=pytest.fail)


def test_missing_package_of_a_backend_stops_startup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "find_spec", lambda name: None)
    plan = make_plan({"name": "mine", "path": str(OPEN_GOLDENS / "tiny-small"), "backend": "stable_audio_tools"})
    with pytest.raises(CheckpointError, match=r"model mine: backend stable_audio_tools needs .* pip install --no-deps"):
        check(plan, print_error=pytest.fail)


@pytest.mark.parametrize("model", [{"name": "tiny", "path": TINY}, {"name": "small-music"}], ids=["folder", "built in"])
def test_startup_fails_if_the_backend_lacks_the_family(
    model: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "missing_packages", tuple)
    with pytest.raises(CheckpointError, match="runs models of the family stable-audio-open, this is stable-audio-3"):
        check(make_plan({**model, "backend": "stable_audio_tools"}), print_error=pytest.fail)


def fetch_elsewhere(folder: Path, endpoint: str) -> list[str]:
    """Read the model's config from the hub, like a head node, which loads no model. Return the warnings and a line.

    The line has the model's family as it was assumed before reading the config, and as the config says.
    """
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch, pointing_library_at(endpoint, folder):
        patch.setattr(package, "find_spec", lambda name: None)  # the package is needed only to load a model
        plan = make_plan({**HUB_MODEL, "backend": "stable_audio_tools"})
        fetch_configs(plan, plan.settings.models, print_error=printed.append)
        families = [card.family for card in (*plan.catalog, *describe_models(plan).catalog)]
    return [*printed, " ".join(families)]


def test_repository_is_described_by_its_config(tmp_path: Path) -> None:
    files = checkpoint_files(OPEN_GOLDENS / "tiny-1.0")
    with running_hub({"lab/model": Repo(files)}) as hub:
        assert fetch_elsewhere(tmp_path, hub.url) == ["stable-audio-3 stable-audio-open"]
        assert hub.fetched == ["model_config.json"]
    assert fetch_elsewhere(tmp_path, "http://127.0.0.1:9")[-1] == "stable-audio-open stable-audio-open"


def test_unreachable_config_of_another_node_only_warns(tmp_path: Path) -> None:
    warning, families = fetch_elsewhere(tmp_path, "http://127.0.0.1:9")
    assert warning.startswith("warning: model lab: lab/model is not complete in ")
    assert warning.endswith("the API describes it as a distilled Stable Audio 3 model of 120 s")
    assert families == "stable-audio-3 stable-audio-3"


def test_backend_without_the_repository_family_stops_startup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_cache(tmp_path, "lab/tiny", Path(TINY))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(package, "missing_packages", tuple)
    plan = make_plan({"name": "tiny", "repo_id": "lab/tiny", "backend": "stable_audio_tools"})
    with pytest.raises(CheckpointError, match="runs models of the family stable-audio-open, this is stable-audio-3"):
        check(plan, print_error=pytest.fail)
