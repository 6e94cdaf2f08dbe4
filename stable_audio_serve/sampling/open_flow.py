"""The flow samplers of the Stable Audio Open models. This module has what differs from the samplers of Stable Audio 3.

Euler and ping-pong are the same as for Stable Audio 3, but at other times. DPM-Solver++ here does not limit the
log-SNR, which is infinite for pure noise, so its second step cannot extrapolate. RK4 here uses evenly spaced times down
to 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from stable_audio_serve.sampling.plan import Guidance, SamplerPlan
from stable_audio_serve.sampling.samplers import (
    SAMPLERS,
    FlowNetwork,
    FlowSampler,
    euler,
    flow_plan,
    pingpong,
    refused_sampler,
    rk4,
)
from stable_audio_serve.sampling.schedules import TimestepShift, check_steps
from stable_audio_serve.sampling.terms import VELOCITY, PlanWriter, register

_FIRST_LOG_SNR, _LAST_LOG_SNR = -6.0, 2.0

_X, _PREVIOUS = register(0), register(1)


def open_flow_times(sampler: str, steps: int, *, level: float, shift: TimestepShift, length: float) -> Tensor:
    """Return the times of `sampler` from `level` to 0, (steps + 1,) float32, for a clip of `length` latent frames.

    The times of RK4 are evenly spaced, then warped by `shift`. The times of other samplers are evenly spaced in
    log-SNR. If `level` is below about 0.12, the times after the first exceed `level`, as in the reference
    implementation. Raises InvalidRequestError if `steps` is out of range.
    """
    check_steps(steps)
    if sampler == "rk4":
        times = torch.linspace(level, 0, steps + 1, dtype=torch.float32)
        return shift.warp(times, torch.tensor(max(length, 1.0), dtype=torch.float32))
    first = math.log((1 - level) / level + 1e-6) if level < 1.0 else _FIRST_LOG_SNR
    times = torch.sigmoid(-torch.linspace(first, _LAST_LOG_SNR, steps + 1, dtype=torch.float32))
    times[0], times[-1] = level, 0.0
    return times


def build_open_flow_plan(
    sampler: str, times: Tensor, *, guidance: Guidance, has_source: bool, level: float | None = None
) -> SamplerPlan:
    """Return the plan of `sampler` for one clip. `times` (steps + 1,) float32 end at 0.

    The initial latents are noise, or with a source (1 - level) source + level noise. If `level` is None, it is the
    first of `times`. For RK4 the first time can differ from `level`, because the shift warps only the times. Raises
    InvalidRequestError if the name `sampler` is unknown.
    """
    if sampler not in _WRITERS:
        raise refused_sampler(sampler, SAMPLERS)
    level = float(times[0]) if level is None else level
    return flow_plan(_WRITERS[sampler], times, guidance=guidance, level=level, has_source=has_source)


def _dpmpp(times: Tensor, guidance: Guidance) -> PlanWriter:
    """DPM-Solver++(2M) (arXiv 2211.01095) for rectified flow. A step from time t to time n sets x to
    (n/t) x + (1 - n)(1 - e^-h) d', where h = lambda(n) - lambda(t) and lambda(t) = ln((1 - t) / t).

    d' is extrapolated from the clean estimates x - t v of the previous and this step, except in the last step. In the
    step after t = 1, where lambda is -inf, the extrapolation has weight 0. Registers: x and the clean estimate of the
    previous step.
    """
    network = FlowNetwork(2, guidance)
    earlier: float | None = None
    for t, following in itertools.pairwise(times.tolist()):
        d = _X - VELOCITY * t
        h = _log_snr(following) - _log_snr(t)
        extrapolated = d
        if earlier and following != 0.0:
            extrapolated = d + (d - _PREVIOUS) * (h / (2.0 * earlier))
        moved = _X * (following / t) - extrapolated * ((1.0 - following) * math.expm1(-h))
        network.evaluate(t, moved, d)
        network.end_step()
        earlier = h
    return network


_WRITERS: Mapping[str, FlowSampler] = {"euler": euler, "rk4": rk4, "dpmpp": _dpmpp, "pingpong": pingpong}


def _log_snr(time: float) -> float:
    """Return the log-SNR ln((1 - t) / t) of a time t in 0..1. It is infinite at 0 and 1."""
    if time <= 0.0:
        return math.inf
    return math.log((1.0 - time) / time) if time < 1.0 else -math.inf
