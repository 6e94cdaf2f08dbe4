"""Masked editing for models without a mask input: some frames of a source are kept while the others are generated.

The network always sees the kept frames as the source at its current noise level:
`x = m x + (1 - m)(alpha z + beta eps')`, with m = 1 in the generated frames, z the source's latents and eps' unit
normal noise. This is the replacement method of "Score-Based Generative Modeling through Stochastic Differential
Equations" (arXiv 2011.13456, appendix I.2).

A sampler keeps several latents per clip, its registers. Only the register that the network reads next is blended, at
the noise level of the next evaluation. The other registers (earlier clean estimates or slopes, intermediate points)
need no blend. Updates are element-wise, so the kept frames of a register affect only the kept frames of other
registers, and a register's kept frames are replaced before the network reads the register.

eps' is drawn once per clip. The kept frames then change smoothly from step to step, which suits samplers that
extrapolate, and steps need no extra random numbers or copies. Drawing a new eps' in each step is not better overall.
On normally distributed data, for which the exact result is known, the means of both methods agree to 3 %. With new
draws, the standard deviation is smaller by 0 to 25 %. For some samplers this is closer to the exact result, for others
farther from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from stable_audio_serve.sampling.plan import LATENTS, Blend, Evaluation, SamplerPlan

NoisePath = Callable[[Evaluation], tuple[float, float]]
"""Returns the factors alpha and beta of an evaluation: how much of z and eps' the network's input contains."""


def sigma_path(evaluation: Evaluation) -> tuple[float, float]:
    """Return the weights (1, sigma) of source z and noise eps' for samplers over sigma (arXiv 2206.00364)."""
    return 1.0, evaluation.sigma


def angle_path(evaluation: Evaluation) -> tuple[float, float]:
    """Return the weights (cos(pi t/2), sin(pi t/2)) of source z and noise eps' for DDIM over the network's time t."""
    return math.cos(math.pi * evaluation.t / 2), math.sin(math.pi * evaluation.t / 2)


def flow_path(evaluation: Evaluation) -> tuple[float, float]:
    """Return the weights (1 - t, t) of source z and noise eps' for rectified flow."""
    return 1.0 - evaluation.t, evaluation.t


def blend_plan(plan: SamplerPlan, path: NoisePath) -> SamplerPlan:
    """Return `plan` with a blend added at the start and after each evaluation.

    After the last blend, the kept frames are exactly the source.
    """
    first, *others = plan.evaluations
    blends = [Blend(evaluation.input_register, *path(evaluation)) for evaluation in others]
    blends.append(Blend(LATENTS, 1.0, 0.0))
    return replace(
        plan,
        start_blend=Blend(LATENTS, *path(first)),
        evaluations=tuple(
            replace(evaluation, blend=blend) for evaluation, blend in zip(plan.evaluations, blends, strict=True)
        ),
    )
