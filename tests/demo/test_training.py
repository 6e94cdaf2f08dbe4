from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.demo_model.clips import ClipConfig, ClipSource
from examples.demo_model.package import write_checkpoint
from examples.demo_model.train_autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    AutoencoderTrainer,
    PatchPool,
    reconstruction_loss,
    standardise,
)
from examples.demo_model.train_decoder import DecoderTrainingConfig, train_decoder
from examples.demo_model.train_denoiser import DenoiserTrainingConfig, Trainer, draw_times
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.registry import BUILT_IN

SMALL = AutoencoderConfig(width=384, batch_patches=96, pool_patches=400, steps=40)


@pytest.fixture
def untrained() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(AutoencoderConfig())


@pytest.mark.slow
def test_twenty_steps_of_stage_one_lower_the_loss(tmp_path: Path) -> None:
    trainer = AutoencoderTrainer(SMALL)
    pool = PatchPool(SMALL.pool_patches, np.random.default_rng(0))
    losses = [trainer.train_step(pool.draw(SMALL.batch_patches, fresh_clips=1)) for _ in range(20)]
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:3])
    trainer.save(tmp_path / "state.pt")
    other = AutoencoderTrainer(SMALL)
    other.load(tmp_path / "state.pt")
    assert other.step == 20
    assert torch.equal(other.model.encoder.project_in.weight, trainer.model.encoder.project_in.weight)


@pytest.mark.slow
def test_twenty_steps_of_stage_two_lower_the_loss(untrained: Autoencoder) -> None:
    trainer = Trainer(DenoiserTrainingConfig(steps=40, warmup_steps=5))
    batch = ClipSource(untrained, ClipConfig(batch_latents=120, longest_s=2.0), rng=np.random.default_rng(0)).draw()
    losses = [trainer.train_step(batch) for _ in range(20)]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:3])


@pytest.mark.slow
def test_stage_three_changes_only_the_decoder(untrained: Autoencoder) -> None:
    before = {name: value.clone() for name, value in untrained.state_dict().items()}
    config = DecoderTrainingConfig(steps=2, clips=ClipConfig(batch_latents=60, longest_s=1.0))
    train_decoder(config, Trainer(DenoiserTrainingConfig(steps=1)), autoencoder=untrained)
    changed = {
        name.split(".")[0] for name, value in untrained.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"decoder"}


def test_standardising_latents_does_not_change_decoded_audio() -> None:
    torch.manual_seed(1)
    model = Autoencoder(dataclasses.replace(SMALL, width=32)).requires_grad_(False)
    frames = torch.rand(3, 222, 16)
    before = model.decoder(model.encoder(frames))
    standardise(model, seed=0, num_clips=30)
    torch.testing.assert_close(model.decoder(model.encoder(frames)), before, atol=1e-4, rtol=1e-3)


def test_in_silence_only_positive_levels_increase_the_loss() -> None:
    silent = torch.zeros(2, 222, 8)
    levels = torch.zeros(2, 222, 8)
    levels[:, :220] = -0.5
    assert reconstruction_loss(levels, silent) == 0
    assert reconstruction_loss(-levels, silent) > 1


def test_times_cover_the_whole_range_and_hit_the_start() -> None:
    times = draw_times(4000)
    assert times.min() < 0.02
    assert 0.03 < (times == 1).float().mean() < 0.1


def test_a_packaged_checkpoint_loads_through_the_ordinary_loader(tmp_path: Path, untrained: Autoencoder) -> None:
    trainer = Trainer(DenoiserTrainingConfig(steps=1))
    write_checkpoint(trainer, untrained, folder=tmp_path)
    model = load_model(replace(BUILT_IN["demo"], folder=str(tmp_path)))
    assert model.spec.hop == 4096
    assert model.autoencoder.decoder_halo_latents == 1
    (embedding,) = model.encode_text(["a 440 Hz sine"])
    assert embedding.mask.sum() == 2
