"""A network small enough to write down, and a loop that runs a plan over it one row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from stable_audio_serve.sampling import NoiseSource, SamplerPlan, advance, network_input


def toy_velocity(x: Tensor, times: Tensor) -> Tensor:
    """The velocity of the sampler goldens: x (B, D, F), times (B,)."""
    t = times.reshape(-1, *[1] * (x.dim() - 1))
    return 0.7 * x + 0.3 * t * torch.tanh(x) + 0.1 * torch.cos(3 * t)


def run_plan(plan: SamplerPlan, state: Tensor, noise: NoiseSource | None = None) -> Tensor:
    """Run every evaluation of `plan` from the row's registers `state` (R, D, F); returns (D, F)."""
    batch = state[None]
    for evaluation in plan.evaluations:
        rows = [evaluation]
        v = toy_velocity(network_input(batch, rows), torch.tensor([evaluation.t]))
        drawn = noise.step(tuple(state.shape[1:]))[None] if noise and evaluation.draws_noise else None
        batch = advance(batch, rows, velocity=v, noise=drawn)
    return batch[0, plan.result_register]
