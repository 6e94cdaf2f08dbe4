"""`verify` of the stored folders detects small bugs that the tests put into the models' arithmetic."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stable_audio_serve.models.sa3 import planning
from stable_audio_serve.models.sa3.autoencoder import AudioAutoencoder
from stable_audio_serve.models.sa3.model import Sa3Model
from tests.goldens import SA3_GOLDENS, SHARP
from tests.parameters import slow
from tests.verification.folders import edit_facts, run_verify

pytestmark = pytest.mark.server

# One case of each kind is enough to detect a bug. More cases would take longer.
CASES = ("gen/t2a_short_unchunked", "gen/t2a_cfg3_neg_apg1")

Mutate = Callable[[pytest.MonkeyPatch], None]


def lower_the_floor(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(planning, "MIN_NOISE_LEVEL", 0.05)


def shorten_the_halo(patch: pytest.MonkeyPatch) -> None:
    exact = AudioAutoencoder.decoder_halo_latents.fget
    assert exact is not None
    patch.setattr(AudioAutoencoder, "decoder_halo_latents", property(lambda net: exact(net) - net.latent_multiple))


def scale_the_negative_output(patch: pytest.MonkeyPatch) -> None:
    exact = Sa3Model.denoise

    def denoise(model: Sa3Model, batch: Any) -> torch.Tensor:
        output = exact(model, batch)
        return torch.cat([output[:1], 0.9999 * output[1:]]) if len(batch.t) == 2 else output

    patch.setattr(Sa3Model, "denoise", denoise)


def scale_the_negative_prompt(patch: pytest.MonkeyPatch) -> None:
    exact = Sa3Model.condition

    def condition(model: Sa3Model, plan: Any, *, prompt: Any, negative: Any, inpaint_latents: Any) -> Any:
        scaled = negative and replace(negative, tokens=0.9999 * negative.tokens)
        return exact(model, plan, prompt=prompt, negative=scaled, inpaint_latents=inpaint_latents)

    patch.setattr(Sa3Model, "condition", condition)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns a copy of each folder in `SHARP`. Each copy has only a few cases."""
    copies = {}
    for name in SHARP:
        copies[name] = Path(shutil.copytree(SA3_GOLDENS / name, tmp_path_factory.mktemp("mutants") / name))
        edit_facts(copies[name], keep_cases)
    return copies


def keep_cases(facts: dict[str, Any]) -> None:
    facts["cases"] = {key: facts["cases"][key] for key in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARP)
def test_unmodified_code_stays_within_every_error_bound(untouched: dict[str, Path], name: str) -> None:
    answer = run_verify(untouched[name])
    assert answer.exit_code == 0, "\n".join(answer.lines)


@pytest.mark.parametrize(
    ("name", "mutate", "component"),
    [
        slow("sharp-s", shorten_the_halo, "decoder halo"),
        slow("sharp-l", scale_the_negative_output, "end-to-end latents"),
        *(slow(name, lower_the_floor, "schedules") for name in SHARP),
        slow("sharp-l", shorten_the_halo, "decoder halo"),
        slow("sharp-s", scale_the_negative_output, "end-to-end latents"),
        *(slow(name, scale_the_negative_prompt, "end-to-end latents") for name in SHARP),
    ],
)
def test_a_deliberate_bug_exceeds_the_error_bound(
    untouched: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, mutate: Mutate, component: str
) -> None:
    mutate(monkeypatch)
    answer = run_verify(untouched[name])
    assert answer.exit_code == 1
    assert component in answer.report["failed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARP)
def test_a_wrong_norm_eps_exceeds_the_error_bound(untouched: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(untouched[name], tmp_path / name))
    file = folder / "model_config.json"
    values = json.loads(file.read_text())
    values["model"]["diffusion"]["config"]["norm_kwargs"]["eps"] = 1e-6
    file.write_text(json.dumps(values))
    assert "denoiser" in run_verify(folder).report["failed"]
