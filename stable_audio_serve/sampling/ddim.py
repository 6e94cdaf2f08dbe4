"""DDIM for networks that predict v = alpha eps - beta x0 at time t, where alpha = cos(pi t/2) and beta = sin(pi t/2).

The sampler is from "Denoising Diffusion Implicit Models" (arXiv 2010.02502), without added noise. Its formulas in terms
of v follow arXiv 2202.00512.
"""

from __future__ import annotations

import math

import torch

from stable_audio_serve.sampling.plan import Guidance, SamplerPlan
from stable_audio_serve.sampling.schedules import check_steps
from stable_audio_serve.sampling.terms import UNCONDITIONAL, VELOCITY, PlanWriter, Terms, register
from stable_audio_serve.sampling.v_network import is_v_guided

_X = register(0)


def ddim(steps: int, level: float, *, guidance: Guidance, has_source: bool) -> SamplerPlan:
    """Return the plan of DDIM from time `level` (at most 1) to 0. The noise is computed from the guided output."""
    return _plan(steps, level, guidance=guidance, has_source=has_source, renoise=VELOCITY)


def ddim_cfgpp(steps: int, level: float, *, guidance: Guidance, has_source: bool) -> SamplerPlan:
    """Return the plan of DDIM with CFG++: in guided steps, the noise is predicted from the unconditional output.

    "CFG++: Manifold-constrained Classifier Free Guidance for Diffusion Models" (arXiv 2406.08070).
    """
    return _plan(steps, level, guidance=guidance, has_source=has_source, renoise=UNCONDITIONAL)


def _plan(steps: int, level: float, *, guidance: Guidance, has_source: bool, renoise: Terms) -> SamplerPlan:
    """Return the plan of DDIM. In guided steps, the noise is predicted from the network output `renoise`.

    The result of the sampler is the clean estimate of its last step. Times and weights are computed in float32.
    """
    check_steps(steps)
    times = torch.linspace(min(level, 1.0), 0, steps + 1, dtype=torch.float32)[:-1]
    alphas: list[float] = torch.cos(times * math.pi / 2).tolist()
    betas: list[float] = torch.sin(times * math.pi / 2).tolist()
    writer = PlanWriter(1)
    for step, (t, alpha, beta) in enumerate(zip(times.tolist(), alphas, betas, strict=True)):
        guided = is_v_guided(guidance, t)
        target = _X * alpha - VELOCITY * beta
        if step + 1 < steps:
            noise = _X * beta + (renoise if guided else VELOCITY) * alpha
            target = target * alphas[step + 1] + noise * betas[step + 1]
        writer.evaluate(target, t=t, sigma=beta, guided=guided)
        writer.end_step()
    return writer.plan(
        source_scale=alphas[0] if has_source else 0.0,
        noise_scale=betas[0] if has_source else 1.0,
    )
