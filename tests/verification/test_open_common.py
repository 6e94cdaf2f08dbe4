"""`verify` on the numbers of the Stable Audio Open family that need no checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from stable_audio_serve.sampling import brownian, multistep, open_flow, v_network
from stable_audio_serve.verification import samplers
from stable_audio_serve.verification.verify import REQUIRED_WITHOUT_MODEL
from tests.goldens import OPEN_GOLDENS, load_open_goldens
from tests.parameters import slow
from tests.verification.folders import Answer, add_to_first, edit_facts, edit_tensors, run_verify

FOLDER = OPEN_GOLDENS / "common"
INPUTS = {"sampler/noise", "sampler/init", "prepare/wave", "brownian/sigmas", "schedule/v_sigma"}

Mutate = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "common"))


@cache
def verify_stored() -> Answer:
    return run_verify(FOLDER)


def missed(answer: Answer) -> set[str]:
    return {entry["key"].split("[")[0] for entry in answer.report["comparisons"] if entry["missed"]}


def test_the_command_accepts_the_folder_and_compares_every_number() -> None:
    answer = verify_stored()
    assert answer.exit_code == 0, "\n".join(answer.lines)
    for component in REQUIRED_WITHOUT_MODEL:
        assert "largest difference" in answer.line(component, "ok")
    compared = {entry["key"].split("[")[0] for entry in answer.report["comparisons"]}
    left_out = {key for key in load_open_goldens("common").tensors if "k-dpm-adaptive" in key}
    assert set(load_open_goldens("common").tensors) - compared == INPUTS | left_out | {"brownian/sampler_f16"}


def test_every_step_of_every_sampler_is_compared() -> None:
    keys = [entry["key"] for entry in verify_stored().report["comparisons"]]
    for name, facts in load_open_goldens("common").facts["cases"].items():
        if name.startswith("sampler/") and "adaptive" not in name:
            for part in ("x", "denoised"):
                assert sum(key.startswith(f"{name}/{part}[") for key in keys) == len(facts["sigma"])


def other_time_of_a_sigma(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(v_network, "sigma_to_time", lambda sigmas: sigmas.atan() * 0.6366)


def noise_with_the_other_sign(patch: pytest.MonkeyPatch) -> None:
    exact = brownian.brownian_steps
    patch.setattr(brownian, "brownian_steps", lambda *args, **rest: [-step for step in exact(*args, **rest)])


def flow_starts_at_another_log_snr(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(open_flow, "_FIRST_LOG_SNR", -6.2)


def lms_of_a_lower_order(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(multistep, "LMS_ORDER", 2)


def other_branch_as_the_guided_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(samplers, "_UNGUIDED_SHARE", 1.0)


@pytest.mark.parametrize(
    ("mutate", "component"),
    [
        (other_time_of_a_sigma, "samplers over sigma"),
        slow(noise_with_the_other_sign, "samplers over sigma"),
        (flow_starts_at_another_log_snr, "schedules"),
        slow(flow_starts_at_another_log_snr, "samplers over time"),
        slow(lms_of_a_lower_order, "samplers over sigma"),
        slow(other_branch_as_the_guided_one, "samplers over time"),
    ],
)
def test_a_deliberate_bug_exceeds_the_error_bound(
    monkeypatch: pytest.MonkeyPatch, mutate: Mutate, component: str
) -> None:
    mutate(monkeypatch)
    answer = run_verify(FOLDER)
    assert answer.exit_code == 1
    assert component in answer.report["failed"]


@pytest.mark.parametrize(
    "key",
    [
        "brownian/tree_3",
        slow("sampler/dpmpp-3m-sde/out"),
        slow("sampler/rf-rk4/denoised"),
        slow("schedule/dist_shift_sine_9999"),
        slow("prepare/up_441"),
    ],
)
def test_changed_numbers_and_draws_are_mismatches(folder: Path, key: str) -> None:
    def change(facts: dict[str, Any]) -> None:
        facts["cases"]["sampler/dpmpp-2m-sde"]["draws"][0]["value"] += 1
        facts["cases"]["sampler/rf-pingpong"]["draws"].pop()

    edit_facts(folder, change)
    edit_tensors(folder / "golden.safetensors", add_to_first(key, 0.01))
    edit_tensors(folder / "golden.safetensors", lambda tensors: tensors.update({"sampler2/x": torch.zeros(2)}))
    answer = run_verify(folder)
    assert missed(answer) == {
        key,
        "sampler/dpmpp-2m-sde/draw_00 integer",
        "sampler/rf-pingpong number and shapes",
    }
    assert "sampler2/x" in answer.line("sampler2", "skipped")


def test_missing_facts_fail(folder: Path) -> None:
    edit_facts(folder, lambda facts: facts.pop("brownian"))
    answer = run_verify(folder)
    assert answer.exit_code == 1
    assert "Brownian paths" in answer.report["failed"]


def test_a_checkpoint_without_its_config_fails(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OPEN_GOLDENS / "tiny-small", tmp_path / "folder"))
    (folder / "model_config.json").unlink()
    answer = run_verify(folder)
    assert answer.exit_code == 1
    assert "model_config.json" in answer.line("checkpoint", "MISSED")
