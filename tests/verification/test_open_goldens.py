"""`verify` on folders of the Stable Audio Open family: stored folders pass, small deliberate bugs exceed a bound."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stable_audio_serve.models import native
from stable_audio_serve.models.protocol import BranchConditioning
from stable_audio_serve.models.sao import conditioners, denoiser, model, planning
from stable_audio_serve.models.sao.network_config import OobleckConfig
from stable_audio_serve.verification.runs import RowNoise
from tests.goldens import OPEN_GOLDENS, load_open_goldens
from tests.parameters import slow
from tests.verification.folders import add_to_first, edit_facts, edit_tensors, run_verify

pytestmark = pytest.mark.server

Mutate = Callable[[pytest.MonkeyPatch], None]
COMPARED = (
    "draws",
    "text tokens",
    "text",
    "text in float16",
    "number",
    "denoiser time features",
    "denoiser",
    "denoiser guidance",
    "denoiser padding",
    "autoencoder",
    "decoder halo",
    "schedules",
    "lengths",
    "end-to-end steps",
    "end-to-end latents",
    "end-to-end audio",
)


@pytest.mark.parametrize("name", ["tiny-small", slow("tiny-1.0")])
def test_the_command_accepts_the_folder_and_compares_every_output(name: str) -> None:
    answer = run_verify(OPEN_GOLDENS / name)
    assert answer.exit_code == 0, "\n".join(answer.lines)
    for component in COMPARED:
        assert "largest difference" in answer.line(component, "ok")
    skipped = [line for line in answer.lines if " skipped " in line]
    assert all("k-dpm-adaptive" in line for line in skipped), skipped
    compared = {entry["key"].split("[")[0] for entry in answer.report["comparisons"]}
    for case, facts in load_open_goldens(name).facts["cases"].items():
        if facts["args"].get("sampler_type") != "k-dpm-adaptive":
            assert {f"{case}/{part}" for part in ("latents", "cross_attn_cond", "global_cond")} <= compared
    assert {"cond/inputs_cross_attn_cond", "cond/inputs_global_cond", "dit/negative_cross_attn_cond"} <= compared


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a copy of a folder. The copy has only one run of each kind."""
    folder = Path(shutil.copytree(OPEN_GOLDENS / "tiny-1.0", tmp_path_factory.mktemp("open") / "folder"))
    kept = ("gen/card", "gen/negative", "gen/init_8.0")
    edit_facts(folder, lambda facts: facts.update(cases={name: facts["cases"][name] for name in kept}))
    return folder


def other_norm_eps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(denoiser, "_NORM_EPS", 1e-6)


def cosines_first(patch: pytest.MonkeyPatch) -> None:
    exact = conditioners.LearnedFrequencies.forward

    def swapped(self: Any, u: torch.Tensor) -> torch.Tensor:
        value, sines, cosines = exact(self, u).split([1, 128, 128], dim=-1)
        return torch.cat([value, cosines, sines], dim=-1)

    patch.setattr(conditioners.LearnedFrequencies, "forward", swapped)


def decoder_halo_one_short(patch: pytest.MonkeyPatch) -> None:
    exact = OobleckConfig.decoder_halo_latents.fget
    assert exact is not None
    patch.setattr(OobleckConfig, "decoder_halo_latents", property(lambda config: exact(config) - 1))


def encoder_halo_one_short(patch: pytest.MonkeyPatch) -> None:
    exact = OobleckConfig.encoder_halo_latents.fget
    assert exact is not None
    patch.setattr(OobleckConfig, "encoder_halo_latents", property(lambda config: exact(config) - 1))


def unconditional_without_seconds(patch: pytest.MonkeyPatch) -> None:
    def without(self: denoiser.DenoiserConditioning) -> denoiser.DenoiserConditioning:
        return denoiser.DenoiserConditioning(torch.zeros_like(self.global_embed), None)

    def without_all(branch: BranchConditioning) -> BranchConditioning:
        return BranchConditioning({"global": torch.zeros_like(branch.constants["global"])})

    patch.setattr(denoiser.DenoiserConditioning, "without_context", without)
    patch.setattr(native, "without_context", without_all)


def heads_interleaved(patch: pytest.MonkeyPatch) -> None:
    # k0 k1 k0 k1 instead of k0 k0 k1 k1
    patch.setattr(denoiser, "share_heads", lambda context, shared_by: context.repeat(1, 1, 1, shared_by, 1, 1))


def negative_scaled(patch: pytest.MonkeyPatch) -> None:
    exact = model.SaoModel.denoise

    def denoise(self: model.SaoModel, batch: Any) -> torch.Tensor:
        output = exact(self, batch)
        return torch.cat([output[:1], 0.9999 * output[1:]]) if len(batch.t) == 2 else output

    patch.setattr(model.SaoModel, "denoise", denoise)


def negative_with_the_prompt_s_seconds(patch: pytest.MonkeyPatch) -> None:
    exact = model.SaoModel.condition

    def condition(self: model.SaoModel, plan: Any, **rest: Any) -> Any:
        return exact(self, replace(plan, negative_numbers=None), **rest)

    patch.setattr(model.SaoModel, "condition", condition)


def negative_without_seconds(patch: pytest.MonkeyPatch) -> None:
    exact = model.SaoModel.condition

    def condition(self: model.SaoModel, plan: Any, **rest: Any) -> Any:
        row = exact(self, plan, **rest)
        if row.unconditional is None:
            return row
        constants = row.unconditional.constants
        emptied = {**constants, "global": torch.zeros_like(constants["global"])}
        return replace(row, unconditional=replace(row.unconditional, constants=emptied))

    patch.setattr(model.SaoModel, "condition", condition)


def every_window_takes_the_first_frames_noise(patch: pytest.MonkeyPatch) -> None:
    exact = RowNoise.window
    patch.setattr(RowNoise, "window", lambda self, stage, start, **rest: exact(self, stage, 0, **rest))


def edits_without_a_mask(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(planning, "blend_plan", lambda plan, path: plan)


@pytest.mark.parametrize(
    ("mutate", "component"),
    [
        (edits_without_a_mask, "end-to-end latents"),
        slow(negative_without_seconds, "end-to-end steps"),
        slow(cosines_first, "number"),
        slow(other_norm_eps, "denoiser"),
        slow(every_window_takes_the_first_frames_noise, "decoder halo"),
        slow(decoder_halo_one_short, "decoder halo"),
        slow(encoder_halo_one_short, "decoder halo"),
        slow(unconditional_without_seconds, "denoiser guidance"),
        slow(heads_interleaved, "denoiser"),
        slow(negative_scaled, "end-to-end latents"),
        slow(negative_with_the_prompt_s_seconds, "end-to-end latents"),
    ],
)
def test_a_deliberate_bug_exceeds_the_error_bound(
    quick: Path, monkeypatch: pytest.MonkeyPatch, mutate: Mutate, component: str
) -> None:
    mutate(monkeypatch)
    answer = run_verify(quick)
    assert answer.exit_code == 1
    assert component in answer.report["failed"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("component", "key"),
    [
        ("denoiser", "model.model.transformer.layers.1.ff.ff.2.bias"),
        ("number", "conditioner.conditioners.seconds_total.embedder.embedding.1.bias"),
        ("autoencoder", "pretransform.model.decoder.layers.0.bias"),
    ],
)
def test_one_changed_weight_names_its_component(tmp_path: Path, component: str, key: str) -> None:
    folder = Path(shutil.copytree(OPEN_GOLDENS / "tiny-small", tmp_path / "folder"))
    edit_tensors(folder / "model.safetensors", add_to_first(key, 0.1))
    assert component in run_verify(folder).report["failed"]


@pytest.mark.slow
def test_malformed_facts_are_mismatches(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OPEN_GOLDENS / "tiny-small", tmp_path / "folder"))
    facts = json.loads((folder / "golden.json").read_text())
    for spoilt in (
        {"cases": {"gen/x": {"args": {}}}},
        {"cond_t5": {}},
        {"rounding": {"worst_cases": {"gen/card/audio": "x"}}},
    ):
        (folder / "golden.json").write_text(json.dumps(facts | spoilt))
        answer = run_verify(folder)
        assert answer.exit_code == 1
        assert answer.lines[-1].startswith("verification failed: ")


def test_a_run_with_an_unknown_argument_is_skipped_by_name(quick: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quick, tmp_path / "folder"))
    edit_facts(folder, lambda facts: facts["cases"]["gen/card"]["args"].update(reverb=0.3))
    edit_facts(folder, lambda facts: facts["cases"]["gen/negative"]["args"]["conditioning"][0].update(bpm=120))
    answer = run_verify(folder)
    assert answer.exit_code == 0, "\n".join(answer.lines)
    reasons = [line for line in answer.lines if line.startswith("end-to-end") and " skipped " in line]
    assert [("reverb" in line, "bpm" in line) for line in reasons] == [(True, False), (False, True)]


@pytest.mark.parametrize(
    "key", [slow("gen/card/trace_denoised"), slow("gen/init_8.0/global_cond"), slow("gen/negative/latents")]
)
def test_one_changed_number_is_a_mismatch(quick: Path, tmp_path: Path, key: str) -> None:
    folder = Path(shutil.copytree(quick, tmp_path / "folder"))
    edit_tensors(folder / "golden.safetensors", add_to_first(key, 0.2))
    answer = run_verify(folder)
    assert {entry["key"].split("[")[0] for entry in answer.report["comparisons"] if entry["missed"]} == {key}


@pytest.mark.slow
def test_the_draws_of_a_run_are_optional(quick: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quick, tmp_path / "folder"))
    edit_facts(folder, lambda facts: facts["cases"]["gen/card"].pop("draws"))
    assert run_verify(folder).exit_code == 0
