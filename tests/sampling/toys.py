"""Networks given by formulas, and a loop that runs a plan with one of them, one row at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stable_audio_serve.sampling import NoiseSource, SamplerPlan, StepTerms, advance, network_input


def toy_velocity(x: Tensor, times: Tensor) -> Tensor:
    """The velocity of the stored sampler runs: x (B, D, F), times (B,)."""
    t = times.reshape(-1, *[1] * (x.dim() - 1))
    return 0.7 * x + 0.3 * t * torch.tanh(x) + 0.1 * torch.cos(3 * t)


def linear_v_velocity(x: Tensor, t: float, *, deviation: float = 0.5) -> Tensor:
    """The exact v for data that is normal around 0, `x` (B, D, F). Flow and diffusion have closed-form solutions."""
    alpha, beta = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
    variance = deviation**2
    return alpha * beta * (1 - variance) / (alpha**2 * variance + beta**2) * x


def run_plan(
    plan: SamplerPlan,
    state: Tensor,
    noise: NoiseSource | None = None,
    *,
    network: Callable[[Tensor, float], Tensor] = lambda x, t: toy_velocity(x, torch.tensor([t])),
    unguided: Callable[[Tensor, float], Tensor] | None = None,
) -> Tensor:
    """Run every evaluation of `plan` from the row's registers `state` (R, D, F). Returns the result (D, F).

    `network` returns the guided output of (x, t), `unguided` the unconditional branch's output.
    """
    batch = state[None]
    for evaluation in plan.evaluations:
        rows = [evaluation]
        x = network_input(batch, StepTerms.of(rows))
        v = network(x, evaluation.t)
        v_uncond = unguided(x, evaluation.t) if unguided else None
        drawn = noise.step(tuple(state.shape[1:]))[None] if noise and evaluation.draws_noise else None
        batch = advance(batch, StepTerms.of(rows), velocity=v, unconditional=v_uncond, noise=drawn)
    return batch[0, plan.result_register]
