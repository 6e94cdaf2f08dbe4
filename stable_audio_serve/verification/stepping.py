"""Runs a sampler's plan step by step outside the engine, so that every point on its way can be compared.

Knows nothing of checkpoints: the network is a function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stable_audio_serve.sampling import (
    SAMPLERS,
    NoiseSource,
    SamplerPlan,
    StepTerms,
    advance,
    network_input,
    start_state,
)
from stable_audio_serve.sampling.v_samplers import OVER_TIME

Network = Callable[[Tensor, float], Tensor]  # x (B, D, F) and the float32 time of all rows -> (B, D, F)


@dataclass(frozen=True, slots=True)
class StepPoint:
    """One step: its time and noise level, x (B, D, F) and the guided output there, and x after the step.

    `last_t` and `last_velocity` are those of the step's last call of the network.
    """

    t: float
    sigma: float
    x: Tensor
    velocity: Tensor
    last_t: float
    last_velocity: Tensor
    following: Tensor


@dataclass(frozen=True, slots=True)
class Walk:
    """All steps of a run, and its result (B, D, F)."""

    points: tuple[StepPoint, ...]
    result: Tensor


def walk_plan(
    plan: SamplerPlan,
    draws: Sequence[NoiseSource],
    *,
    noise: Tensor,
    source: Tensor | None,
    network: Network,
    unguided: Network,
) -> Walk:
    """Run `plan` over the rows of `noise` (B, D, F); `draws` are the rows' own, `source` (B, D, F) or None.

    `network` is the guided output, `unguided` the other branch's, asked only where the plan needs it.
    """
    rows = range(len(noise))
    sources = [None if source is None else source[row] for row in rows]
    state = torch.stack([start_state(plan, noise[row], source=sources[row]) for row in rows])
    shape, points = tuple(noise.shape[1:]), []
    for start, stop in zip((0, *plan.step_ends[:-1]), plan.step_ends, strict=True):
        x, velocities = state[:, plan.start_register], []
        calls = plan.evaluations[start:stop]
        for call in calls:
            together = StepTerms.of([call] * len(noise))
            seen = network_input(state, together)
            velocities.append(network(seen, call.t))
            state = advance(
                state,
                together,
                velocity=velocities[-1],
                unconditional=unguided(seen, call.t) if any(call.b_uncond) else None,
                noise=torch.stack([row.step(shape) for row in draws]) if call.draws_noise else None,
            )
        points.append(
            StepPoint(
                t=calls[0].t,
                sigma=calls[0].sigma,
                x=x,
                velocity=velocities[0],
                last_t=calls[-1].t,
                last_velocity=velocities[-1],
                following=state[:, plan.result_register],
            )
        )
    return Walk(tuple(points), state[:, plan.result_register])


@dataclass(frozen=True, slots=True)
class Traced:
    """What the reference's callback reports of a step."""

    x: Tensor
    denoised: Tensor


def trace(walk: Walk, sampler: str, *, sigmas: Sequence[float]) -> list[Traced]:
    """Returns what the reference reports of a run at the noise levels `sigmas`, which fall.

    It reports x before a step, but after it for Euler and RK4 of flow models (RK4 with the last call's output) and for
    DDIM, whose last step leaves x alone. DPM-Solver-fast reports pieces of several calls. Raises ValueError when the
    run has no step at a level.
    """
    points = iter(walk.points)
    found = []
    for sigma in sigmas:
        point = next((point for point in points if math.isclose(point.sigma, sigma, rel_tol=2e-6)), None)
        if point is None:
            raise ValueError(f"the run has no step at noise level {sigma:g}")
        found.append(_traced(point, sampler, is_last=point is walk.points[-1]))
    return found


def _traced(point: StepPoint, sampler: str, *, is_last: bool) -> Traced:
    if sampler == "rk4":
        return Traced(point.following, point.following - point.last_t * point.last_velocity)
    if sampler in SAMPLERS:
        return Traced(point.following if sampler == "euler" else point.x, point.x - point.t * point.velocity)
    if sampler in OVER_TIME:
        angle = point.t * math.pi / 2
        clean = point.x * math.cos(angle) - point.velocity * math.sin(angle)
        return Traced(point.x if is_last else point.following, clean)
    variance = point.sigma**2 + 1
    return Traced(point.x, point.x / variance - point.velocity * (point.sigma / math.sqrt(variance)))
