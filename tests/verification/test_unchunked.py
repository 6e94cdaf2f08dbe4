"""With `chunked: false` in a config, verification encodes and decodes audio in one piece, as the reference does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.protocol import DecodeWindow, EncodeWindow
from stable_audio_serve.models.registry import resolve_entry
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.sampling.noise import ReplayNoise
from stable_audio_serve.verification.checks import Goldens
from stable_audio_serve.verification.runs import (
    CallOrderNoise,
    Case,
    RowNoise,
    draw_script,
    parse_case,
    plan_case,
    replay_rows,
    run_case,
)
from tests.goldens import SA3_GOLDENS
from tests.models.loaded import assert_near

pytestmark = pytest.mark.server

SILENT = RowNoise(ReplayNoise(0, (), num_rows=1).row(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(SA3_GOLDENS / "tiny-s", tmp_path_factory.mktemp("unchunked") / "tiny-s"))
    values = json.loads((folder / "model_config.json").read_text())
    values["model"]["pretransform"]["chunked"] = False
    (folder / "model_config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Sa3Model:
    model = load_model(resolve_entry("unchunked", path=str(folder)))
    assert isinstance(model, Sa3Model)
    return model


def make_case(model: Sa3Model, tensors: dict[str, Tensor], **args: Any) -> Case:
    defaults = {"steps": 8, "cfg_scale": 1.0, "sample_size": 5292032, "duration_padding_sec": 6.0, "apg_scale": 1.0}
    goldens = Goldens({"generate_defaults": defaults}, tensors)
    return parse_case({"args": args}, goldens=goldens, chunked=model.config.chunked)


def test_long_audio_is_encoded_and_decoded_in_one_piece(folder: Path, model: Sa3Model) -> None:
    stored, source = Goldens.load(folder), {"sample_rate": 1000, "tensor": "ae/audio_long"}
    tensors = {"ae/audio_long": stored["ae/audio_long"][0]}
    case = make_case(model, tensors, seed=3, duration=9.6, duration_padding_sec=0, sample_size=9600, init_audio=source)
    (plan,) = plan_case(model, case)
    assert plan.init_source is not None
    assert [(span.start, span.stop) for span in plan.init_source.windows] == [(0, 150)]
    assert [(span.start, span.stop) for span in plan.decode_windows] == [(0, 150)]
    (latents,) = model.encode_audio([EncodeWindow(plan.init_source.samples, 0, "init", SILENT)])
    assert_near(latents, stored["ae/encode_long_full_quiet"][0], within=2e-5)
    (audio,) = model.decode([DecodeWindow(stored["ae/latents_long"][0], 0, SILENT)])
    assert_near(audio, stored["ae/decode_long_full_quiet"][0], within=2e-5)


def test_a_run_decodes_with_the_noise_of_one_piece(folder: Path, model: Sa3Model) -> None:
    """The reference draws the start noise, one noise per pingpong step, then the decoder's noise."""
    stored = Goldens.load(folder)
    args, latents = stored.facts["cases"]["gen/t2a_default"]["args"], stored["gen/t2a_default/latents_keymask"]
    noise = CallOrderNoise(args["seed"])
    for _ in range(1 + args["steps"]):
        noise.initial(tuple(latents.shape))
    (expected,) = model.decode([DecodeWindow(latents[0], 0, noise)])

    case = make_case(model, {}, **args)
    (made,) = run_case(model, case, noise=replay_rows(case, draw_script(model, case)))
    assert made.audio.shape == (2, 2337)
    assert_near(made.audio, expected[:, :2337], within=1e-4)


def test_runs_keep_the_models_features(model: Sa3Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, the engine would otherwise turn on fused kernels, which tests compare separately, in Python 3.11."""
    switched: list[dict[str, bool]] = []
    monkeypatch.setattr(Sa3Model, "use_features", lambda self, **features: switched.append(features))
    case = make_case(model, {}, seed=3, duration=0.5, duration_padding_sec=0, steps=1)
    run_case(model, case, noise=replay_rows(case, draw_script(model, case)))
    assert not switched
