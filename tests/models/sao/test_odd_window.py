"""Models whose longest duration is not a whole number of latent frames, such as some fine-tunes (430.66 frames)."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.engine.scheduling.windows import SourceEncoding
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.parts import WindowNoise, stack_draws
from stable_audio_serve.models.registry import resolve_entry
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.sampling.noise import SeededNoise
from stable_audio_serve.verification.checks import Goldens
from stable_audio_serve.verification.verify import Report, compare
from tests.goldens import load_open_goldens
from tests.models.sao.test_model import with_sample_size

HOP, FRAMES, TAIL = 64, 430, 42
SAMPLES = FRAMES * HOP + TAIL


def load_with(sample_size: int, tmp_path: Path, *, name: str) -> SaoModel:
    folder = with_sample_size(load_open_goldens(name).folder, sample_size, target=tmp_path / name)
    model = load_model(resolve_entry("odd", path=str(folder)))
    assert isinstance(model, SaoModel)
    return model


@pytest.mark.parametrize("stage", ["init", "inpaint"])
@torch.inference_mode()
def test_the_last_window_encodes_the_rest_of_a_frame(stage: str, tmp_path: Path) -> None:
    model = load_with(SAMPLES, tmp_path, name="tiny-1.0")
    clip = np.random.default_rng(0).uniform(-0.8, 0.8, (2, SAMPLES + 99)).astype(np.float32)
    sources = {f"{stage}_audio": SourceAudio(clip, 1000)}
    (plan,) = model.plan(GenerationRequest(prompt="", duration_s=27.0, seed=1, **sources))
    source, noise = getattr(plan, f"{stage}_source"), SeededNoise(1)
    torch.testing.assert_close(source.samples, torch.from_numpy(clip[:, :SAMPLES]), rtol=0, atol=0)
    assert len(source.windows) > 1
    encoding = SourceEncoding(source, stage=stage, noise=noise, hop=HOP)
    while encoding.lengths_left:
        for window in encoding.pending():
            encoding.put(model.encode_audio([window])[0])
    draw = partial(stack_draws, shape=(model.spec.card.latent_channels, FRAMES), frame_axis=1, device=model.device)
    whole = model.autoencoder.encode(source.samples[None], draw([WindowNoise(noise, stage, 0)], "bottleneck"))[0]
    torch.testing.assert_close(encoding.latents(), whole, rtol=0, atol=2e-5)


@pytest.mark.server
def test_verification_accepts_a_run_with_a_fractional_window(tmp_path: Path) -> None:
    """The stored run has 64 latent frames. Without a source, a window with 30 more samples gives the same result."""
    stored, case = Goldens.load(load_open_goldens("tiny-small").folder), "gen/one_step"
    facts = json.loads(json.dumps({"cases": {case: stored.facts["cases"][case]}}))
    facts["cases"][case]["args"]["sample_size"] += 30
    sample_size = facts["cases"][case]["args"]["sample_size"]
    stored.facts.clear()
    stored.facts.update(facts)
    report = Report(say=lambda line: None)
    compare(report, stored, model=load_with(sample_size, tmp_path, name="tiny-small"), only={"end-to-end"})
    assert not report.failures
    assert f"{case}/latents" in {found.key for found in report.comparisons if found.component == "lengths"}
    assert not [found for found in report.comparisons if found.missed]
