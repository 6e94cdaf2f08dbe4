"""`verify` fails on tampered folders and names the fault."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.parameters import slow, some
from tests.verification.folders import (
    QUICK_CASES,
    add_to_first,
    edit_facts,
    edit_tensors,
    make_quick_copy,
    run_verify,
)

pytestmark = pytest.mark.server

WEIGHTS = {
    "text": "t5gemma/model.safetensors:encoder.layers.0.mlp.up_proj.weight",
    "number": "model.safetensors:conditioner.conditioners.seconds_total.embedder.embedding.1.bias",
    "denoiser": "model.safetensors:model.model.transformer.layers.1.ff.ff.2.bias",
    "autoencoder": "model.safetensors:pretransform.model.decoder.layers.3.mapping.bias",
}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_quick_copy(tmp_path_factory.mktemp("quick") / "folder")


@pytest.fixture
def folder(untouched: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(untouched, tmp_path / "folder"))


def test_what_cannot_be_compared_is_skipped_by_name(folder: Path) -> None:
    """Without key-masked numbers, only unpadded rows are compared."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lyrics/x"] = torch.zeros(2)
        for key in [key for key in tensors if key.startswith("gen/") and "keymask" in key]:
            del tensors[key]

    edit_tensors(folder / "golden.safetensors", change)
    edit_facts(folder, lambda facts: facts["cases"].update({"gen/new": {"args": {"prompt": "rain", "reverb": 0.3}}}))
    answer = run_verify(folder)
    assert answer.exit_code == 0, "\n".join(answer.lines)
    assert "lyrics/x" in answer.line("lyrics", "skipped")
    skipped = [line for line in answer.lines if line.startswith("end-to-end ") and " skipped " in line]
    assert ["reverb" in line for line in skipped] == [False, True]
    assert "padded rows" in skipped[0]
    keys = {entry["key"] for entry in answer.report["comparisons"] if entry["component"].startswith("end-to-end")}
    assert keys == {f"{QUICK_CASES[0]}/{output}[0]" for output in ("latents", "audio")}
    stated = json.loads((folder / "golden.json").read_text())["components"]["rounding"]["max_abs"]
    bounds = {each["key"].split("[")[0]: each["bound"] for each in answer.report["comparisons"]}
    shared = stated.keys() & bounds.keys()
    assert shared  # the bound of these is ten times the stated rounding, instead of the bound of their component
    assert {key: bounds[key] for key in shared} == pytest.approx({key: 10 * stated[key] for key in shared})


@pytest.mark.parametrize("component", some(WEIGHTS, {"denoiser"}))
def test_one_changed_weight_names_its_component(folder: Path, component: str) -> None:
    file, key = WEIGHTS[component].split(":")
    edit_tensors(folder / file, add_to_first(key, 0.1))
    answer = run_verify(folder)
    assert answer.exit_code == 1
    assert answer.lines[-1].startswith("verification failed: ")
    assert "largest difference" in answer.line(component, "MISSED")
    others = set(WEIGHTS) - {component}
    assert not others.intersection(answer.report["failed"])


@pytest.mark.parametrize(
    "key", [slow("ae/decode_quiet"), slow("dit/cfg3_neg_apg1"), "gen/t2a_partly_padded/audio_keymask"]
)
def test_one_changed_number_is_a_mismatch(folder: Path, key: str) -> None:
    edit_tensors(folder / "golden.safetensors", add_to_first(key, 0.01))
    answer = run_verify(folder)
    assert answer.exit_code == 1
    assert [entry["key"].split("[")[0] for entry in answer.report["comparisons"] if entry["missed"]] == [key]


@pytest.mark.parametrize("component", ["denoiser", slow("text"), slow("number"), slow("autoencoder")])
def test_a_missing_weight_names_its_component(folder: Path, component: str) -> None:
    file, key = WEIGHTS[component].split(":")
    edit_tensors(folder / file, lambda tensors: tensors.pop(key))
    answer = run_verify(folder)
    assert answer.exit_code == 1
    assert key in answer.line(component, "MISSED")
    assert answer.report["failed"] == [component]


@pytest.mark.parametrize(
    ("file", "component", "damage"),
    [
        ("model.safetensors", "checkpoint", "cut short"),
        slow("model.safetensors", "checkpoint", "removed"),
        slow("model_config.json", "checkpoint", "cut short"),
        ("model_config.json", "checkpoint", "removed"),
        ("t5gemma/model.safetensors", "text", "cut short"),
        slow("t5gemma/model.safetensors", "text", "removed"),
        ("golden.safetensors", "goldens", "cut short"),
        ("golden.safetensors", "goldens", "removed"),
        ("golden.json", "goldens", "cut short"),
        slow("golden.json", "goldens", "removed"),
    ],
)
def test_unreadable_files_are_mismatches_without_a_traceback(
    folder: Path, file: str, component: str, damage: str
) -> None:
    path = folder / file
    path.write_bytes(path.read_bytes()[:1000]) if damage == "cut short" else path.unlink()
    answer = run_verify(folder)
    assert answer.exit_code == 1
    assert answer.line(component, "MISSED")
    assert not any("Traceback" in line for line in answer.lines)


def test_malformed_facts_and_missing_comparisons_are_mismatches(folder: Path) -> None:
    def keep_no_autoencoder(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith("ae/")]:
            del tensors[key]

    edit_tensors(folder / "golden.safetensors", keep_no_autoencoder)
    edit_facts(folder, lambda facts: facts["components"].update(number={"values": "many"}))
    edit_facts(folder, lambda facts: facts["cases"][QUICK_CASES[0]]["args"].update(duration="long"))
    edit_facts(folder, lambda facts: facts["cases"][QUICK_CASES[1]]["args"].update(seed=1))
    answer = run_verify(folder)
    assert answer.exit_code == 1
    assert {"number", "end-to-end", "draws", "end-to-end latents"} <= set(answer.report["failed"])
    assert "nothing was compared" in answer.line("autoencoder", "MISSED")
    json.dumps(answer.report)
