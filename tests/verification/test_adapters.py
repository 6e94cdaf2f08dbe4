"""`verify` compares the model's outputs with the adapters in the subfolder `lora`, and its report names faults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stable_audio_serve.verification.checks import Goldens
from stable_audio_serve.verification.verify import Report, compare
from tests.goldens import load_goldens
from tests.models.loaded import loaded
from tests.verification.folders import add_to_first, edit_tensors

NAME = "tiny-s"
CHAIN = "stack_dora_rows_layers+lora_all/dit_out"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a copy of the stored reference numbers and adapters, without the checkpoint."""
    source = load_goldens(NAME).folder
    shutil.copytree(source / "lora", tmp_path / "lora")
    for file in ("golden.json", "golden.safetensors"):
        shutil.copy(source / file, tmp_path)
    return tmp_path


def check_adapters(folder: Path) -> Report:
    report = Report(lambda line: None)
    with report.guard("goldens"):
        compare(report, Goldens.load(folder), model=loaded(NAME), only=["adapters"])
    return report


def missed(report: Report) -> list[str]:
    return [one.key for one in report.comparisons if one.missed]


def edit_lora_facts(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "lora" / "lora_golden.json"
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


def rename(folder: Path, old: str, new: str, **config: Any) -> None:
    """Rename an adapter in its file name, the facts and the tensor keys. `config` changes the file's `lora_config`."""
    path = folder / "lora" / f"{old}.safetensors"
    with safe_open(path, "pt") as file:
        stated = json.loads(file.metadata()["lora_config"]) | config
    save_file(load_file(path), folder / "lora" / f"{new}.safetensors", metadata={"lora_config": json.dumps(stated)})
    path.unlink()

    def rename_keys(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    edit_tensors(folder / "lora" / "lora_golden.safetensors", rename_keys)
    edit_lora_facts(folder, lambda facts: facts["files"].update({new: facts["files"].pop(old) | config}))


def test_stored_adapters_pass_and_other_types_are_refused(folder: Path) -> None:
    report = check_adapters(folder)
    assert not report.failed
    refused = [one.key for one in report.comparisons if "not served" in one.key]
    assert len(refused) == 6
    assert len(report.comparisons) == 15 + len(refused)
    assert "adapter 'bora_ff' has type bora" in refused[0]
    assert "adapter 'dora_cols_attn' has type dora-cols" in refused[-1]


def test_other_names_and_a_legacy_type_come_from_the_facts(folder: Path) -> None:
    rename(folder, "dora_rows_layers", "warm_2", adapter_type="dora")
    rename(folder, "lora_all", "tape")
    report = check_adapters(folder)
    assert not report.failed, report.failures
    keys = {one.key for one in report.comparisons}
    assert {"lora/stack_warm_2+tape/dit_out", "lora/stack_tape_1.0+warm_2_0.25/dit_out"} <= keys


def test_without_the_stated_fault_a_chain_changes_all_layers(folder: Path) -> None:
    edit_lora_facts(folder, lambda facts: facts.pop("stack_index_quirk"))
    assert missed(check_adapters(folder)) == [f"lora/{CHAIN}"]


def test_wrong_numbers_are_named(folder: Path) -> None:
    keys = {CHAIN, "lora_xs_layer1/strength_0.5/dit_out", "lora_all/strength_1.0/number_2.337"}
    for key in keys:
        edit_tensors(folder / "lora" / "lora_golden.safetensors", add_to_first(key, 1e-3))
    assert set(missed(check_adapters(folder))) == {f"lora/{key}" for key in keys}


def test_a_changed_weight_of_an_adapter_is_named(folder: Path) -> None:
    path = folder / "lora" / "lora_xs_layer1.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] += 0.25
    save_file(tensors, path, metadata=metadata)
    assert missed(check_adapters(folder)) == [
        f"lora/lora_xs_layer1/strength_{strength}/dit_out" for strength in (0.5, 1.0)
    ]


@pytest.mark.parametrize("damage", ["cut short", "removed"])
def test_a_damaged_adapter_is_named(folder: Path, damage: str) -> None:
    path = folder / "lora" / "lora_xs_layer1.safetensors"
    path.write_bytes(path.read_bytes()[:200]) if damage == "cut short" else path.unlink()
    report = check_adapters(folder)
    assert report.failed == ["adapters"]
    assert len(report.failures["adapters"]) == 3
    assert all("adapter 'lora_xs_layer1'" in reason for reason in report.failures["adapters"])
    assert len(report.comparisons) == 18


def test_a_type_that_is_refused_for_another_reason_is_a_mismatch(folder: Path) -> None:
    (folder / "lora" / "bora_ff.safetensors").write_bytes(b"x" * 99)
    keys = missed(check_adapters(folder))
    assert len(keys) == 3
    assert all(key.startswith("lora/bora_ff/strength_") and "not a safetensors file" in key for key in keys)


@pytest.mark.parametrize("name", ["lora_golden.json", "lora_golden.safetensors"])
def test_unreadable_numbers_of_adapters_are_named(folder: Path, name: str) -> None:
    (folder / "lora" / name).write_bytes(b"x")
    (reason,) = check_adapters(folder).failures["goldens"]
    assert name in reason


def test_unknown_outputs_are_left_unread(folder: Path) -> None:
    add = {"lora_all/summed_0.5/dit_out": torch.zeros(2)}
    edit_tensors(folder / "lora" / "lora_golden.safetensors", lambda tensors: tensors.update(add))
    goldens = Goldens.load(folder)
    compare(Report(lambda line: None), goldens, model=loaded(NAME), only=["adapters"])
    assert [key for key in goldens.unused() if key.startswith("lora/")] == ["lora/lora_all/summed_0.5/dit_out"]
