"""A loaded model, used through `DiffusionModel`: conditioning, guidance, and steps with different rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from stable_audio_serve.models.protocol import RowConditioning, RowPlan, StepBatch
from stable_audio_serve.models.sa3.model import Sa3Model
from tests.goldens import SHARP
from tests.models.loaded import assert_near, loaded
from tests.models.sa3.requests import make_clip, make_request


def admit(model: Sa3Model, **fields: Any) -> tuple[RowPlan, RowConditioning]:
    (plan,) = model.plan(make_request(steps=4, **fields))
    texts = [plan.prompt, *([plan.negative_prompt] if plan.negative_prompt is not None else [])]
    prompt, *negative = model.encode_text(texts)
    latents = None
    if plan.inpaint_source is not None:
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(model.spec.card.latent_channels, plan.frames, generator=generator)
    conditioning = model.condition(
        plan, prompt=prompt, negative=negative[0] if negative else None, inpaint_latents=latents
    )
    return plan, conditioning


def step_packed(model: Sa3Model, rows: list[tuple[RowPlan, Any, torch.Tensor, float]]) -> list[torch.Tensor]:
    plans = [plan for plan, *_ in rows]
    frames = tuple(plan.frames for plan in plans)
    padded = torch.zeros(len(rows), 1, max(frames))
    batch = StepBatch.of(
        padded,
        t=torch.tensor([t for *_, t in rows]),
        valid=padded[:, 0] > 0,
        branches=[branch for _, branch, _, _ in rows],
    )
    batch = replace(
        batch,
        x=torch.cat([latents for _, _, latents, _ in rows], dim=1)[None],
        valid=None,
        frames=frames,
        valid_frames=tuple(plan.valid_frames for plan in plans),
    )
    return list(model.denoise(batch)[0].split(list(batch.frames), dim=1))


def step(model: Sa3Model, rows: list[tuple[RowPlan, Any, torch.Tensor, float]], *, frames: int) -> torch.Tensor:
    x = torch.full((len(rows), model.spec.card.latent_channels, frames), 9.0)
    valid = torch.zeros(len(rows), frames, dtype=torch.bool)
    for index, (plan, _, latents, _) in enumerate(rows):
        x[index, :, : plan.frames] = latents
        valid[index, : plan.valid_frames] = True
    times = torch.tensor([t for *_, t in rows])
    return model.denoise(StepBatch.of(x, t=times, valid=valid, branches=[branch for _, branch, _, _ in rows]))


@pytest.mark.parametrize("name", SHARP)
def test_different_rows_in_one_step_equal_each_row_alone(name: str) -> None:
    model = loaded(name)
    edit = {"inpaint_audio": make_clip(), "inpaint_regions_s": ((0.2, 0.9),)}
    admitted = [
        admit(model, cfg_scale=1.0),
        admit(model, duration_s=0.4, cfg_scale=3.0, negative_prompt="low quality"),
        admit(model, duration_s=5.1, cfg_scale=2.0, **edit),
        admit(model, duration_s=1.0, prompt="", cfg_scale=4.0),
    ]
    generator = torch.Generator().manual_seed(5)
    rows = []
    for index, (plan, conditioning) in enumerate(admitted):
        latents = torch.randn(model.spec.card.latent_channels, plan.frames, generator=generator)
        branches = [conditioning.conditional, conditioning.unconditional]
        rows += [(plan, branch, latents, 0.2 + 0.2 * index) for branch in branches if branch is not None]
    assert len(rows) == 7
    together, packed = step(model, rows, frames=256), step_packed(model, rows)
    assert together.dtype == packed[0].dtype == torch.float32
    for index, row in enumerate(rows):
        whole = step(model, [row], frames=row[0].frames)[0]
        assert_near(packed[index], whole, within=1e-5)
        alone = whole[:, : row[0].valid_frames]
        assert_near(together[index, :, : row[0].valid_frames], alone, within=1e-5)
        assert torch.isfinite(alone).all()


def num_bytes(row: RowConditioning) -> int:
    branches = [branch for branch in (row.conditional, row.unconditional) if branch is not None]
    own = {id(value): value.nbytes for branch in branches for value in branch.constants.values()}
    return sum(own.values())


def test_branches_count_only_their_memory() -> None:
    model = loaded("sharp-l")
    _, plain = admit(model, cfg_scale=1.0)
    _, null = admit(model, cfg_scale=3.0)
    _, negative = admit(model, cfg_scale=3.0, negative_prompt="noise")
    assert plain.unconditional is None
    assert num_bytes(null) == num_bytes(plain)
    assert num_bytes(plain) < num_bytes(negative) < 2 * num_bytes(plain)


def test_spec_matches_the_checkpoint() -> None:
    spec = loaded("sharp-l").spec
    assert (spec.card.sample_rate_hz, spec.hop, spec.card.latent_channels, spec.card.channels) == (1000, 64, 16, 2)
    assert spec.max_frames == 384
    assert spec.noisy_source_encoder
    assert not loaded("sharp-s").spec.noisy_source_encoder
    assert (loaded("sharp-s").spec.default_sampler, spec.default_sampler) == ("pingpong", "euler")
