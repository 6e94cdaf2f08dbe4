"""A checkpoint's hash is the same in every folder, and different after any change of the weights or the config."""

from __future__ import annotations

from pathlib import Path

import pytest

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.weight_hash import hash_weights
from tests.goldens import SA3_GOLDENS
from tests.models.revisions import GOOD, copy_checkpoint, fill_revisions

TINY = SA3_GOLDENS / "tiny-s"


def hash_of(folder: Path) -> str:
    return hash_weights(folder, folder / "t5gemma")


def test_the_hash_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    copy = copy_checkpoint(TINY, tmp_path / "copy")
    fill_revisions(tmp_path, "lab/tiny", {GOOD: copy}, main=GOOD)
    snapshot = tmp_path / "models--lab--tiny" / "snapshots" / GOOD
    assert hash_of(TINY) == hash_of(copy) == hash_of(snapshot)
    assert len(hash_of(copy)) == 64


@pytest.mark.parametrize("name", ["model.safetensors", "t5gemma/model.safetensors", "t5gemma/tokenizer.json"])
@pytest.mark.parametrize("place", [0.01, 0.37, 0.999])
def test_any_changed_bit_changes_the_hash(tmp_path: Path, name: str, place: float) -> None:
    copy = copy_checkpoint(TINY, tmp_path / "copy")
    data = bytearray((copy / name).read_bytes())
    data[int(place * len(data))] ^= 1
    (copy / name).write_bytes(data)
    assert hash_of(copy) != hash_of(TINY)


def test_a_changed_config_changes_the_hash(tmp_path: Path) -> None:
    copy = copy_checkpoint(TINY, tmp_path / "copy")
    with (copy / "model_config.json").open("a") as file:
        file.write("\n")
    assert hash_of(copy) != hash_of(TINY)


def test_a_changed_file_in_the_hub_s_cache_is_named(tmp_path: Path) -> None:
    fill_revisions(tmp_path, "lab/tiny", {GOOD: copy_checkpoint(TINY, tmp_path / "copy")}, main=GOOD)
    snapshot = tmp_path / "models--lab--tiny" / "snapshots" / GOOD
    blob = (snapshot / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(CheckpointError, match="not those that the hub listed"):
        hash_of(snapshot)
