"""Downloads of checkpoints by huggingface_hub, from a local server that imitates the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models import download as downloading
from stable_audio_serve.models.download import check_access, download_entry
from stable_audio_serve.models.families import find_files, load_model
from stable_audio_serve.models.registry import ModelEntry, describe_entry, resolve_entry
from tests.goldens import OPEN_GOLDENS, SA3_GOLDENS
from tests.models.hub import COMMIT, REFUSAL, Repo, checkpoint_files, pointing_library_at, running_hub, silent_hub
from tests.parameters import slow

pytestmark = pytest.mark.server

TINY = SA3_GOLDENS / "tiny-s"
OPEN = OPEN_GOLDENS / "tiny-small"
UNUSED = {"README.md": b"", "notes.safetensors": b"", "transformer/model.safetensors": b"for diffusers"}
FILES = checkpoint_files(TINY) | UNUSED
NEEDED = {path: content for path, content in FILES.items() if path not in UNUSED and not path.startswith("lora/")}
ENCODER_WEIGHTS = "t5gemma/model.safetensors"
ACTIONS: dict[str, Callable[[ModelEntry], object]] = {
    "download": download_entry,
    "check": check_access,
    "rate": lambda entry: describe_entry(entry).card.sample_rate_hz,
}


def run(
    actions: str,
    home: Path,
    *,
    endpoint: str,
    repo_id: str = "lab/model",
    revision: str | None = None,
    token: str | None = None,
    is_offline: bool = False,
) -> list[dict[str, str]]:
    """Run actions (checks or downloads). Returns for each the `folder` of the files, or the `message` of the error."""
    entry = ModelEntry(ModelCard("model", "stable-audio-3"), repo_id=repo_id, revision=revision)
    results: list[dict[str, str]] = []
    with pointing_library_at(endpoint, home / "hub", token=token, is_offline=is_offline):
        for name in actions.split():
            try:
                results.append({"folder": str(ACTIONS[name](entry))})
            except CheckpointError as error:
                results.append({"message": error.message})
    assert not any("\n" in result.get("message", "") for result in results)
    return results


def download(tmp_path: Path, **settings: Any) -> dict[str, str]:
    (result,) = run("download", tmp_path, **settings)
    return result


def check(tmp_path: Path, **settings: Any) -> str | None:
    """Check the access to the model's files, like a starting server. Returns the error message, or None."""
    (result,) = run("check", tmp_path, **settings)
    return result.get("message")


def refusal(tmp_path: Path, named: str, **settings: Any) -> str:
    """Assert that both the access check and the download fail with an error that contains `named`.

    Returns the message of the access check.
    """
    early, late = (result["message"] for result in run("check download", tmp_path, **settings))
    assert named in early
    assert named in late
    return early


def without(name: str) -> dict[str, bytes]:
    return {path: content for path, content in FILES.items() if path != name}


def test_needed_files_are_fetched_once(tmp_path: Path) -> None:
    with running_hub({"lab/model": Repo(FILES, revisions=("main", "v1"))}) as hub:
        assert check(tmp_path, endpoint=hub.url, revision="v1") is None
        assert hub.fetched == ["model_config.json"]
        first = download(tmp_path, endpoint=hub.url, revision="v1")
        fetched, num_requests = sorted(hub.fetched), hub.requests
        again, checked = run("download check", tmp_path, endpoint=hub.url, revision="v1")
        assert checked == {"folder": "None"}
        assert (sorted(hub.fetched), hub.requests) == (fetched, num_requests)
    folder = Path(first["folder"])
    assert folder.name == COMMIT
    assert fetched == sorted(NEEDED)
    assert (folder / ENCODER_WEIGHTS).read_bytes() == FILES[ENCODER_WEIGHTS]
    assert again == first


def test_unfinished_files_of_killed_downloads_are_removed(tmp_path: Path) -> None:
    blobs = tmp_path / "hub" / "hub" / "models--lab--model" / "blobs"
    blobs.mkdir(parents=True)
    abandoned, running = blobs / "12ab.0b638de6.incomplete", blobs / "12ab.5c2f90aa.incomplete"
    for file in (abandoned, running):
        file.touch()
    os.utime(abandoned, (0, 0))
    with running_hub({"lab/model": Repo(NEEDED)}) as hub:
        download(tmp_path, endpoint=hub.url)
    assert list(blobs.glob("*.incomplete")) == [running]


def test_cached_files_serve_without_a_network(tmp_path: Path) -> None:
    with running_hub({"lab/model": Repo(FILES)}) as hub:
        online = download(tmp_path, endpoint=hub.url)
    assert download(tmp_path, endpoint=hub.url) == online  # the hub does not run any more
    assert download(tmp_path, endpoint=hub.url, is_offline=True) == online
    assert check(tmp_path, endpoint=hub.url, is_offline=True) is None


@pytest.mark.parametrize("revision", [COMMIT, slow("main"), slow("v1")])
def test_an_access_check_fetches_the_config(tmp_path: Path, revision: str) -> None:
    with running_hub({"lab/model": Repo(FILES, revisions=("main", "v1"))}) as hub:
        results = run("rate check rate", tmp_path, endpoint=hub.url, revision=revision)
        assert hub.fetched == ["model_config.json"]
        assert "folder" in download(tmp_path, endpoint=hub.url, revision=revision)
    own = json.loads(FILES["model_config.json"])["sample_rate"]
    assert [result["folder"] for result in results] == ["44100", "None", str(own)]


@pytest.mark.parametrize(
    ("files", "lost"),
    [
        slow(FILES, "model.safetensors"),
        (FILES, "t5gemma/tokenizer.json"),
        (checkpoint_files(OPEN), "t5/config.json"),  # without it, a T5 of another repository would be used
    ],
)
def test_an_incomplete_cache_is_not_used(tmp_path: Path, files: dict[str, bytes], lost: str) -> None:
    with running_hub({"lab/model": Repo(files)}) as hub:
        folder = Path(download(tmp_path, endpoint=hub.url)["folder"])
        (folder / lost).unlink()
        offline = check(tmp_path, endpoint=hub.url, is_offline=True)
        assert check(tmp_path, endpoint=hub.url) is None
        assert download(tmp_path, endpoint=hub.url) == {"folder": str(folder)}
        assert (folder / lost).is_file()
        (folder / lost).unlink()
    unreachable = check(tmp_path, endpoint=hub.url)
    assert offline is not None
    assert unreachable is not None
    assert f"lab/model is not complete in {tmp_path / 'hub' / 'hub'} and offline mode is on" in offline
    assert f"and {hub.url} cannot be reached" in unreachable


def test_a_truncated_cached_file_is_named(tmp_path: Path) -> None:
    with running_hub({"lab/model": Repo(FILES)}) as hub:
        weights = Path(download(tmp_path, endpoint=hub.url)["folder"]) / "model.safetensors"
        os.truncate(weights, 1000)
        message = check(tmp_path, endpoint=hub.url)
    assert message is not None
    assert message.startswith(f"{weights} is corrupt or incomplete")


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    with running_hub({"lab/model": Repo(FILES)}) as hub:
        cached = Path(download(tmp_path, endpoint=hub.url)["folder"]).parent.parent
        (cached / "refs" / "main").write_bytes(b"\xff")
        message = refusal(tmp_path, "repair or delete it", endpoint=hub.url)
    assert message.startswith(f"{cached} cannot be read ('utf-8' codec")


def test_a_gated_repository_needs_a_token_with_accepted_terms(tmp_path: Path) -> None:
    with running_hub({"lab/model": Repo(FILES, gated=True, token="good")}) as hub:
        message = refusal(tmp_path, "lab/model is gated", endpoint=hub.url)
        assert f"{hub.url}/lab/model" in message
        assert "HF_TOKEN" in message
        refusal(tmp_path, "lab/model is gated", endpoint=hub.url, token="bad")
        assert check(tmp_path, endpoint=hub.url, token="good") is None
        assert "folder" in download(tmp_path, endpoint=hub.url, token="good")


def test_missing_repository(tmp_path: Path) -> None:
    with running_hub({}) as hub:
        refusal(tmp_path, "lab/model does not exist or is private", endpoint=hub.url)


def test_missing_revision(tmp_path: Path) -> None:
    with running_hub({"lab/model": Repo(FILES)}) as hub:
        refusal(tmp_path, "no revision 'v9'", endpoint=hub.url, revision="v9")


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("model_config.json", "lab/model holds no model_config.json"),
        (ENCODER_WEIGHTS, "t5gemma holds no model.safetensors"),
        ("t5gemma/config.json", "text encoder was not found"),
    ],
)
def test_missing_file(tmp_path: Path, name: str, named: str) -> None:
    with running_hub({"lab/model": Repo(without(name))}) as hub:
        refusal(tmp_path, named, endpoint=hub.url)


def renamed(*names: str) -> dict[str, bytes]:
    """Returns the checkpoint's files with the weights file stored under each of `names` instead of its own name."""
    files = {path: content for path, content in NEEDED.items() if path != "model.safetensors"}
    return files | dict.fromkeys(names, NEEDED["model.safetensors"])


def test_weights_of_a_fine_tune_may_have_any_name(tmp_path: Path) -> None:
    with running_hub({"lab/model": Repo(renamed("Foundation_1.safetensors"))}) as hub:
        assert check(tmp_path, endpoint=hub.url) is None
        folder = Path(download(tmp_path, endpoint=hub.url)["folder"])
        fetched = sorted(hub.fetched)
        assert download(tmp_path, endpoint=hub.url) == {"folder": str(folder)}
        assert check(tmp_path, endpoint=hub.url, is_offline=True) is None
    assert (folder / "Foundation_1.safetensors").read_bytes() == NEEDED["model.safetensors"]
    assert sorted(hub.fetched) == fetched == sorted(renamed("Foundation_1.safetensors"))


def test_pickled_weights_are_fetched_if_there_are_no_others(tmp_path: Path) -> None:
    files = renamed("one.ckpt")
    with running_hub({"lab/model": Repo(files)}) as hub:
        assert check(tmp_path, endpoint=hub.url) is None
        assert (Path(download(tmp_path, endpoint=hub.url)["folder"]) / "one.ckpt").is_file()


@pytest.mark.parametrize(
    ("names", "named"),
    [
        ((), "lab/model holds no weights; expected model.safetensors"),
        (
            ("two.ckpt", "one.ckpt"),
            "lab/model holds no model.safetensors, and any of 2 files could be meant (one.ckpt, two.ckpt)",
        ),
    ],
)
def test_ambiguous_weights_are_refused(tmp_path: Path, names: tuple[str, ...], named: str) -> None:
    with running_hub({"lab/model": Repo(renamed(*names))}) as hub:
        refusal(tmp_path, named, endpoint=hub.url)
        assert not [path for path in hub.fetched if path.endswith(".ckpt")]


def test_a_full_disk_for_renamed_weights_is_named(tmp_path: Path) -> None:
    with running_hub({"lab/model": Repo(renamed("one.ckpt"), sizes={"one.ckpt": 10**15})}) as hub:
        assert "lab/model takes 1000000.00 GB" in (check(tmp_path, endpoint=hub.url) or "")


@pytest.mark.parametrize("name", ["model.safetensors", "t5gemma/config.json"])
def test_a_file_that_the_hub_refuses(tmp_path: Path, name: str) -> None:
    with running_hub({"lab/model": Repo(FILES, refused=(name,))}) as hub:
        refusal(tmp_path, f"access to lab/model was refused (403: {REFUSAL})", endpoint=hub.url)


@pytest.mark.parametrize(
    ("status", "named"), [(403, "was refused (403)"), (500, "answered 500"), (429, "answered 429")]
)
def test_a_hub_that_refuses_access(tmp_path: Path, status: int, named: str) -> None:
    with running_hub({"lab/model": Repo(FILES, status=status)}) as hub:
        assert named in (check(tmp_path, endpoint=hub.url) or "")


def test_a_hub_that_fails(tmp_path: Path) -> None:
    with running_hub({"lab/model": Repo(FILES, status=503)}) as hub:
        refusal(tmp_path, "answered 503", endpoint=hub.url)


def test_no_network(tmp_path: Path) -> None:
    assert "path" in refusal(tmp_path, "cannot be reached", endpoint="http://127.0.0.1:9")


def test_a_failed_download_with_xet_may_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Task error: error sending request for url (https://cas?Signature=s)")  # as hf_xet does

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    entry = ModelEntry(ModelCard("model", "stable-audio-3"), repo_id="lab/model")
    with (
        running_hub({"lab/model": Repo(FILES)}) as hub,
        pointing_library_at(hub.url, tmp_path),
        pytest.raises(CheckpointError, match="HF_HUB_DISABLE_XET") as caught,
    ):
        download_entry(entry)
    assert caught.value.retry_after_s == 30.0
    assert "(Task error: error sending request)" in caught.value.message


def test_offline_mode_without_a_cache(tmp_path: Path) -> None:
    refusal(tmp_path, "unset HF_HUB_OFFLINE", endpoint="http://127.0.0.1:9", is_offline=True)


def test_an_invalid_repository_name(tmp_path: Path) -> None:
    refusal(tmp_path, "no valid repository name", endpoint="http://127.0.0.1:9", repo_id="a/b/c")


def test_an_invalid_token(tmp_path: Path) -> None:
    with running_hub({"lab/model": Repo(FILES)}) as hub:
        assert "HF_TOKEN" in (check(tmp_path, endpoint=hub.url, token="hf_t\xf3ken") or "")


def test_a_server_that_is_not_a_hub(tmp_path: Path) -> None:
    with running_hub({"lab/model": Repo(FILES)}) as hub:
        assert "no answer of a model hub" in (check(tmp_path, endpoint=f"{hub.url}/elsewhere") or "")


def test_a_silent_hub_times_out_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert downloading._REQUEST_TIMEOUT_S < 5.0
    monkeypatch.setattr(downloading, "_REQUEST_TIMEOUT_S", 0.1)
    check(tmp_path, endpoint="http://127.0.0.1:9")  # imports what the measured check needs
    started_at = time.monotonic()
    with silent_hub() as url:
        message = check(tmp_path, endpoint=url)
    assert time.monotonic() - started_at < 8.0  # huggingface_hub would wait ten seconds for a response
    assert message is not None
    assert f"{url} cannot be reached" in message


def test_a_full_disk_is_named_before_the_download(tmp_path: Path) -> None:
    with running_hub({"lab/model": Repo(FILES, sizes={"model.safetensors": 10**15})}) as hub:
        message = check(tmp_path, endpoint=hub.url)
    assert message is not None
    assert message.startswith(f"lab/model takes 1000000.00 GB of {tmp_path / 'hub' / 'hub'}, where ")


@pytest.mark.parametrize("has_links", [slow(True), False])
def test_downloaded_files_need_no_more_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, has_links: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", not has_links)
    with running_hub({"lab/model": Repo(FILES)}) as hub:
        folder = Path(download(tmp_path, endpoint=hub.url)["folder"])
    (folder / "t5gemma" / "config.json").unlink()
    with running_hub({"lab/model": Repo(FILES, sizes={"model.safetensors": 10**15})}) as hub:
        assert check(tmp_path, endpoint=hub.url) is None


def test_a_disk_that_fills_during_the_download_is_named(tmp_path: Path, tiny_disk: Path) -> None:
    with running_hub({"lab/model": Repo(FILES)}) as hub:
        message = download(tiny_disk, endpoint=hub.url)["message"]
    assert message.startswith(f"lab/model could not be stored in {tiny_disk / 'hub' / 'hub'}: ")
    assert "No space left" in message


T5_REPO = "google-t5/t5-base"


def load(home: Path, endpoint: str, **fields: str) -> list[str]:
    """Check the access to a model, then load it. Returns for each step the type of the result, or the error."""
    entry = resolve_entry("model", **fields)
    actions: tuple[Callable[[ModelEntry], object], ...] = (check_access, load_model)
    results = []
    with pointing_library_at(endpoint, home / "hub"):
        for action in actions:
            try:
                results.append(type(action(entry)).__name__)
            except CheckpointError as error:
                results.append(error.message)
    return results


@pytest.mark.parametrize("place", [slow("repository"), "folder"])
def test_a_text_encoder_of_another_repository_is_fetched_once(tmp_path: Path, place: str) -> None:
    files = {path: content for path, content in checkpoint_files(OPEN).items() if not path.startswith("t5/")}
    encoder = {
        path.removeprefix("t5/"): data for path, data in checkpoint_files(OPEN).items() if path.startswith("t5/")
    }
    entry = {"repo_id": "lab/open"}
    if place == "folder":
        entry = {"path": str(tmp_path / "open")}
        for path, data in files.items():
            (tmp_path / "open" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "open" / path).write_bytes(data)
    with running_hub({"lab/open": Repo(files)}) as hub:
        for result in load(tmp_path, hub.url, **entry):
            assert T5_REPO in result
            assert "\n" not in result
    with running_hub({"lab/open": Repo(files), T5_REPO: Repo(encoder | {"tf_model.h5": b"not needed"})}) as hub:
        assert load(tmp_path, hub.url, **entry) == ["NoneType", "SaoModel"]
        assert not [path for path in hub.fetched if "tf_model" in path]
        num_requests = hub.requests
        assert load(tmp_path, hub.url, **entry) == ["NoneType", "SaoModel"]
        assert hub.requests == num_requests


def test_a_config_that_cannot_be_used_is_refused_before_the_download(tmp_path: Path) -> None:
    for files, section in ((FILES, "diffusion"), (FILES, "pretransform"), (checkpoint_files(OPEN), "diffusion")):
        config = json.loads(files["model_config.json"])
        config["model"][section]["config"]["extra"] = 1
        changed = files | {"model_config.json": json.dumps(config).encode()}
        home = tmp_path / f"{section}-{len(files)}"
        with running_hub({"lab/model": Repo(changed)}) as hub, pointing_library_at(hub.url, home):
            with pytest.raises(CheckpointError, match=rf"model.{section}.config.extra is not known"):
                find_files(resolve_entry("model", repo_id="lab/model"))
            assert hub.fetched == ["model_config.json"]


def test_a_text_encoder_of_the_base_model_is_fetched(tmp_path: Path) -> None:
    config = json.loads(NEEDED["model_config.json"])
    prompt = config["model"]["conditioning"]["configs"][0]["config"]
    del prompt["model_path"]
    prompt |= {"repo_id": "lab/base", "subfolder": "t5gemma"}
    tuned = {"model_config.json": json.dumps(config).encode(), "tuned.safetensors": NEEDED["model.safetensors"]}
    (tmp_path / "tuned").mkdir()
    for name, content in tuned.items():
        (tmp_path / "tuned" / name).write_bytes(content)
    with (
        pointing_library_at("http://127.0.0.1:9", tmp_path / "hub", is_offline=True),
        pytest.raises(CheckpointError, match="the text encoder of lab/base is not complete in"),
    ):
        check_access(resolve_entry("model", path=str(tmp_path / "tuned")))
    with running_hub({"lab/tuned": Repo(tuned)}) as hub:
        assert all("lab/base" in result for result in load(tmp_path, hub.url, repo_id="lab/tuned"))
    with running_hub({"lab/tuned": Repo(tuned), "lab/base": Repo(FILES)}) as hub:
        assert load(tmp_path, hub.url, repo_id="lab/tuned") == ["NoneType", "Sa3Model"]
        encoder = {path for path in NEEDED if path.startswith("t5gemma/")}
        assert set(hub.fetched) == encoder
        num_requests = hub.requests
        assert load(tmp_path, hub.url, repo_id="lab/tuned") == ["NoneType", "Sa3Model"]
        assert hub.requests == num_requests
