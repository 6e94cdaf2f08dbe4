"""Masked editing for models without a mask input: some frames of a source are kept while the others are generated.

The network always sees the kept frames as the source at its current noise level:
`x = m x + (1 - m)(alpha z + beta eps')`, with m = 1 in the generated frames, z the source's latents and eps' unit
normal noise. This is the replacement method of "Score-Based Generative Modeling through Stochastic Differential
Equations" (arXiv 2011.13456, appendix I.2). Independent of networks and requests.

Only the register that the network reads next is blended, at the noise level of that evaluation. The other registers
(earlier clean estimates or slopes, intermediate points) need no blend: updates are element-wise, so their kept frames
affect only kept frames of later registers, which are replaced before the network reads them.

eps' is drawn once per row. The kept frames then change smoothly from step to step, which suits samplers that
extrapolate, and steps need no extra draws or copies. New draws at each step are not better. On normally distributed
data, for which the exact answer is known, the means of both methods agree to 3 %. With new draws, the spread is smaller
by 0 to 25 %, which is closer to the exact answer for some samplers and farther from it for others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from stable_audio_serve.sampling.plan import Blend, Evaluation, SamplerPlan

NoisePath = Callable[[Evaluation], tuple[float, float]]
"""The shares of z and eps' in what the network's input register holds at an evaluation."""


def sigma_path(evaluation: Evaluation) -> tuple[float, float]:
    """Return the weights of z + sigma eps', for samplers over noise levels sigma (arXiv 2206.00364)."""
    return 1.0, evaluation.sigma


def angle_path(evaluation: Evaluation) -> tuple[float, float]:
    """Return the weights of cos(pi t/2) z + sin(pi t/2) eps', for DDIM over the time of a network trained for v."""
    return math.cos(math.pi * evaluation.t / 2), math.sin(math.pi * evaluation.t / 2)


def flow_path(evaluation: Evaluation) -> tuple[float, float]:
    """Return the weights of (1 - t) z + t eps', for rectified flow."""
    return 1.0 - evaluation.t, evaluation.t


def blend_plan(plan: SamplerPlan, path: NoisePath) -> SamplerPlan:
    """Return `plan` with a blend at the start and after each evaluation. After the last blend, kept frames equal z."""
    first, *others = plan.evaluations
    blends = [Blend(evaluation.input_register, *path(evaluation)) for evaluation in others]
    blends.append(Blend(plan.result_register, 1.0, 0.0))
    return replace(
        plan,
        start_blend=Blend(plan.start_register, *path(first)),
        evaluations=tuple(
            replace(evaluation, blend=blend) for evaluation, blend in zip(plan.evaluations, blends, strict=True)
        ),
    )
