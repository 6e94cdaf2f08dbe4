"""Builds sampler plans for models that predict v, from the name of the sampler, the noise levels and the number of
steps.

The samplers have the same names as in stable-audio-tools. This module has the formulas of DDIM; `multistep` and
`singlestep` have the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch

from stable_audio_serve.sampling import multistep, singlestep
from stable_audio_serve.sampling.blend import NoisePath, angle_path, sigma_path
from stable_audio_serve.sampling.karras import SigmaRange, polyexponential_sigmas
from stable_audio_serve.sampling.plan import Guidance, SamplerPlan
from stable_audio_serve.sampling.samplers import refused_sampler
from stable_audio_serve.sampling.schedules import check_steps
from stable_audio_serve.sampling.terms import UNCONDITIONAL, VELOCITY, PlanWriter, Terms, register
from stable_audio_serve.sampling.v_network import VNetwork, is_v_guided

_X = register(0)


def _ddim(steps: int, level: float, *, guidance: Guidance, has_source: bool, renoise: Terms) -> SamplerPlan:
    """Return the plan of DDIM from time `level` (at most 1) to 0. In guided steps, the noise is predicted from the
    network output `renoise`. With the unconditional output, this is CFG++ (arXiv 2406.08070).

    DDIM is from "Denoising Diffusion Implicit Models" (arXiv 2010.02502), here without added noise. The network
    predicts v = alpha eps - beta x0 at time t, where alpha = cos(pi t/2) and beta = sin(pi t/2) (arXiv 2202.00512).
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
        writer.call(target, t=t, sigma=beta, guided=guided)
        writer.end_step()
    return writer.plan(
        source_scale=alphas[0] if has_source else 0.0,
        noise_scale=betas[0] if has_source else 1.0,
    )


# For each sampler over sigma: its number of registers and the function that adds its steps to a plan.
_OVER_SIGMA: dict[str, tuple[int, Callable[[VNetwork, Sequence[float]], None]]] = {
    "dpmpp-3m-sde": (3, multistep.dpmpp_3m_sde),
    "dpmpp-2m-sde": (2, multistep.dpmpp_2m_sde),
    "dpmpp-2m": (2, multistep.dpmpp_2m),
    "k-heun": (2, singlestep.heun),
    "k-lms": (multistep.LMS_ORDER, multistep.lms),
    "k-dpmpp-2s-ancestral": (2, singlestep.dpmpp_2s_ancestral),
    "k-dpm-2": (2, singlestep.dpm_2),
}
OVER_TIME = {"v-ddim": partial(_ddim, renoise=VELOCITY), "v-ddim-cfgpp": partial(_ddim, renoise=UNCONDITIONAL)}
_FAST = "k-dpm-fast"
V_SAMPLERS = (*_OVER_SIGMA, _FAST, *OVER_TIME)


def v_path(sampler: str) -> NoisePath:
    """Return the function that `blend_plan` needs for plans of this sampler: the weights of source and noise."""
    return angle_path if sampler in OVER_TIME else sigma_path


def build_v_plan(sampler: str, steps: int, *, span: SigmaRange, guidance: Guidance, has_source: bool) -> SamplerPlan:
    """Return the plan of `sampler` with `steps` steps over the noise levels of `span`.

    A plan starts from noise times `sigma_max`. With a source, that noise is added to the source, so `sigma_max` says
    how far the result may differ from the source. The exceptions are `v-ddim` and `v-ddim-cfgpp`: they use `sigma_max`
    as a time (at most 1) and ignore the rest of `span`.
    Raises InvalidRequestError if the sampler is unknown, or if `steps` or `rho` is invalid.
    """
    if sampler in OVER_TIME:
        return OVER_TIME[sampler](steps, span.sigma_max, guidance=guidance, has_source=has_source)
    if sampler == _FAST:
        network = VNetwork(3, guidance)
        singlestep.dpm_fast(network, steps, span=span)
        level = float(polyexponential_sigmas(1, span)[0])
    elif sampler in _OVER_SIGMA:
        num_registers, write = _OVER_SIGMA[sampler]
        sigmas: list[float] = polyexponential_sigmas(steps, span).tolist()
        network = VNetwork(num_registers, guidance)
        write(network, sigmas)
        level = sigmas[0]
    else:
        raise refused_sampler(sampler, V_SAMPLERS)
    return network.plan(source_scale=1.0 if has_source else 0.0, noise_scale=level)
