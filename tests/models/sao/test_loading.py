"""Loading checkpoint folders of the Stable Audio Open family: official, fine-tuned, exported and damaged ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stable_audio_serve.core.catalog import OPEN_FAMILY
from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.registry import BUILT_IN, describe_entry, resolve_entry
from stable_audio_serve.models.sao.model import SaoModel
from tests.goldens import load_open_goldens

QKV = "model.model.transformer.layers.0.self_attn.to_qkv.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Yields a copy of a checkpoint, which the test may damage."""
    return Path(shutil.copytree(load_open_goldens("tiny-1.0").folder, tmp_path / "checkpoint"))


def load(folder: Path, name: str = "mine") -> SaoModel:
    model = load_model(resolve_entry(name, path=str(folder)))
    assert isinstance(model, SaoModel)
    return model


def failure(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert "\n" not in caught.value.message
    return caught.value.message


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def configure(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "model_config.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def plan_of(model: SaoModel, **fields: Any) -> Any:
    return model.plan(GenerationRequest(**{"prompt": "rain", "duration_s": 1.0, "seed": 1, **fields}))[0]


def test_a_wrong_key_is_named(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.update({QKV.replace("to_qkv", "to_qk"): weights.pop(QKV)}))
    assert "self_attn.to_qk.weight does not belong to this network" in failure(folder)


def test_a_missing_key_is_named(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.pop(QKV))
    assert f"{QKV} is missing" in failure(folder)


def test_a_text_encoder_of_another_width_is_named(folder: Path) -> None:
    projection = "conditioner.conditioners.prompt.proj_out"
    wide = {f"{projection}.weight": torch.zeros(64, 96), f"{projection}.bias": torch.zeros(64)}
    rewrite(folder, lambda weights: weights.update(wide))
    message = failure(folder)
    assert f"{projection}.bias (and 1 more) does not belong to this network" in message
    assert message.endswith(f"; the text encoder in {folder / 't5'} has width 64")


def test_an_unknown_config_key_is_named(folder: Path) -> None:
    configure(folder, lambda values: values["model"]["diffusion"]["config"].update(adaptive_magic=True))
    assert "model.diffusion.config.adaptive_magic" in failure(folder)


def test_an_empty_text_encoder_name_is_refused(folder: Path) -> None:
    configure(folder, lambda values: values["model"]["conditioning"]["configs"][0]["config"].update(t5_model_name=""))
    assert "t5_model_name must be the name of a T5" in failure(folder)


def test_half_precision_and_pickled_fine_tunes_load(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.update({key: value.half() for key, value in weights.items()}))
    halved = load(folder)
    assert halved.denoiser.dtype == torch.float32
    weights = load_file(folder / "model.safetensors")
    torch.save({"state_dict": weights, "global_step": 7}, folder / "model.ckpt")
    (folder / "model.safetensors").unlink()
    pickled = load(folder)
    key = "transformer.layers.0.self_attn.to_qkv.weight"
    assert torch.equal(pickled.denoiser.state_dict()[key], halved.denoiser.state_dict()[key])


@pytest.mark.parametrize("name", ["Foundation_1.safetensors", "kick.ckpt"])
def test_the_only_weights_of_a_folder_may_have_any_name(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (save_file if name.endswith("safetensors") else torch.save)(weights, folder / name)
    assert plan_of(load(folder)).frames == 743
    (folder / f"other-{name}").write_bytes(b"")
    assert f"({name}, other-{name})" in failure(folder)


def test_raw_training_checkpoints_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    raw = {f"diffusion.{key}": value for key, value in weights.items()}
    raw |= {f"diffusion_ema.ema_model.{key}": value for key, value in weights.items() if key.startswith("model.")}
    torch.save({"state_dict": raw}, folder / "model.ckpt")
    (folder / "model.safetensors").unlink()
    assert "raw training checkpoint; export it first" in failure(folder)


def test_a_fractional_window_is_cut_as_in_the_reference(folder: Path) -> None:
    configure(folder, lambda values: values.update(sample_size=882 * 64 + 32))
    model = load(folder)
    assert plan_of(model).frames == 882
    assert model.spec.card.max_duration_s == pytest.approx(882 * 64 / 1000)
    assert plan_of(model, duration_s=882 * 64 / 1000).output_samples == 882 * 64


@pytest.mark.parametrize(
    ("objective", "sampler", "steps", "cfg_scale"),
    [
        (None, "dpmpp-3m-sde", 100, 7.0),
        ("v", "dpmpp-3m-sde", 100, 7.0),
        ("rectified_flow", "euler", 50, 7.0),
        ("rf_denoiser", "pingpong", 8, 1.0),
    ],
)
def test_objective_samplers_and_defaults_come_from_the_config(
    folder: Path, objective: str | None, sampler: str, steps: int, cfg_scale: float
) -> None:
    if objective is not None:
        configure(folder, lambda values: values["model"]["diffusion"].update(diffusion_objective=objective))
    card = describe_entry(resolve_entry("tuned", path=str(folder))).card
    model = load(folder, "tuned")
    assert model.spec.card == card
    assert (card.family, card.objective, card.default_steps) == (OPEN_FAMILY, objective or "v", steps)
    assert card.conditions_on_start
    assert sampler in card.samplers
    plan = plan_of(model)
    assert (len(plan.sampler.step_ends), plan.guidance.cfg_scale, model.spec.default_sampler) == (
        steps,
        cfg_scale,
        sampler,
    )


@pytest.mark.parametrize("name", ["stable-audio-open-1.0", "stable-audio-open-small"])
def test_official_models_are_known_by_name_and_repository(name: str) -> None:
    entry = BUILT_IN[name]
    assert entry.repo_id == f"stabilityai/{name}"
    assert entry.card.aliases == (entry.repo_id,)
    assert entry.card.family == OPEN_FAMILY


def test_a_built_in_name_keeps_its_own_defaults_for_other_files(folder: Path) -> None:
    card = describe_entry(resolve_entry("stable-audio-open-1.0", path=str(folder))).card
    assert (card.default_steps, card.default_cfg_scale, card.max_duration_s) == (
        100,
        7.0,
        pytest.approx(47.552, abs=0.01),
    )
