"""Toy networks, which are formulas, and a function that runs a sampler's plan for one row."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stable_audio_serve.sampling.noise import NoiseSource
from stable_audio_serve.sampling.plan import LATENTS, SamplerPlan
from stable_audio_serve.sampling.update import StepTerms, advance, network_input


def toy_velocity(x: Tensor, times: Tensor) -> Tensor:
    """Returns the velocity at x (batch, channels, frames) and `times` (batch,). The stored runs used this formula."""
    t = times.reshape(-1, *[1] * (x.dim() - 1))
    return 0.7 * x + 0.3 * t * torch.tanh(x) + 0.1 * torch.cos(3 * t)


def linear_v_velocity(x: Tensor, t: float, *, deviation: float = 0.5) -> Tensor:
    """Returns the exact v at x, if the data are normal around 0.

    For such data the samplers' exact results are known.
    """
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
    """Run all evaluations of `plan`, starting at `state` (registers, channels, frames). Returns (channels, frames).

    `network` returns the guided output for (x, t), and `unguided` returns the unconditional output.
    """
    batch = state[None]
    for evaluation in plan.evaluations:
        rows = [evaluation]
        x = network_input(batch, StepTerms.of(rows))
        v = network(x, evaluation.t)
        v_uncond = unguided(x, evaluation.t) if unguided else None
        drawn = noise.step(tuple(state.shape[1:]))[None] if noise and evaluation.draws_noise else None
        batch = advance(batch, StepTerms.of(rows), velocity=v, unconditional=v_uncond, noise=drawn)
    return batch[0, LATENTS]
