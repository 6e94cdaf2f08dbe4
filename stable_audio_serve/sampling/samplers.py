"""The samplers of flow models. Each turns the schedule of one clip into a plan of network calls and updates.

Coefficients are float64, computed from float32 times. In the formulas a step goes from time t to time t', v is the
network's velocity at (x, t), and D = x - t v is the clean estimate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.sampling.plan import Guidance, SamplerPlan
from stable_audio_serve.sampling.terms import NOISE, VELOCITY, PlanWriter, Terms, register

# Samplers of other programs that choose their step sizes while they run. They are refused, because a plan is made in
# advance.
DATA_DEPENDENT = ("k-dpm-adaptive", "dpm-adaptive")

_TINY = 1e-10  # denominators t and 1 - t' are at least this, as in the reference implementations
_LAST_RK4_TIME = 1e-5  # RK4 calls the network at this time instead of t = 0

_X, _PREVIOUS, _TOTAL = register(0), register(1), register(2)

# A function that adds all steps of a sampler to a plan, from the times (steps + 1,) float32.
FlowSampler = Callable[[Tensor, Guidance], PlanWriter]


def build_plan(sampler: str, sigmas: Tensor, *, guidance: Guidance, has_source: bool) -> SamplerPlan:
    """Return the plan of `sampler` for one clip with the schedule `sigmas` (steps + 1,) float32, which ends at 0.

    The initial latents are noise, or with a source (1 - sigmas[0]) source + sigmas[0] noise. An evaluation is guided if
    `cfg_scale` is not 1 and its time is within the interval of `guidance`. Raises InvalidRequestError if the name
    `sampler` is unknown.
    """
    if sampler not in _WRITERS:
        raise refused_sampler(sampler, SAMPLERS)
    return flow_plan(_WRITERS[sampler], sigmas, guidance=guidance, level=float(sigmas[0]), has_source=has_source)


def flow_plan(write: FlowSampler, times: Tensor, *, guidance: Guidance, level: float, has_source: bool) -> SamplerPlan:
    """Return the plan that `write` makes for one clip.

    The initial latents are noise, or with a source (1 - level) source + level noise.
    """
    writer = write(times.to(torch.float32), guidance)
    return writer.plan(source_scale=1.0 - level if has_source else 0.0, noise_scale=level if has_source else 1.0)


def refused_sampler(name: str, samplers: Sequence[str]) -> InvalidRequestError:
    """Return the error for a sampler name that is not in `samplers`. Names in DATA_DEPENDENT get another message."""
    valid = ", ".join(samplers)
    if name in DATA_DEPENDENT:
        message = f"sampler_type {name!r} chooses its steps from the data and is not offered; valid: {valid}"
    else:
        message = f"unknown sampler_type {name[:40]!r}; valid: {valid}"
    return InvalidRequestError(message, field="sampler_type", allowed=valid)


class FlowNetwork(PlanWriter):
    """Collects calls of a flow model's network."""

    def __init__(self, num_registers: int, guidance: Guidance) -> None:
        super().__init__(num_registers)
        self._is_guided = guidance.cfg_scale != 1.0
        # Times and the interval are compared in float32, as in the reference implementations.
        self._low, self._high = torch.tensor(guidance.interval, dtype=torch.float32).tolist()

    def evaluate(self, t: float, *targets: Terms, input_register: int = 0) -> None:
        """Add one network call at time t. Afterwards the registers are set to `targets`."""
        guided = self._is_guided and self._low <= t <= self._high
        self.call(*targets, t=t, sigma=t, guided=guided, input_register=input_register)


def euler(times: Tensor, guidance: Guidance) -> PlanWriter:
    """Euler's method: a step from t to t' sets x to x + (t' - t) v, where v is the velocity."""
    network = FlowNetwork(1, guidance)
    for t, following in itertools.pairwise(times.tolist()):
        network.evaluate(t, _X + VELOCITY * (following - t))
        network.end_step()
    return network


def pingpong(times: Tensor, guidance: Guidance) -> PlanWriter:
    """Ping-pong: a step to time t' sets x to (1 - t') D + t' eps, where D is the clean estimate and eps fresh noise.
    The last step draws noise too, although its weight is 0.
    """
    network = FlowNetwork(1, guidance)
    for t, following in itertools.pairwise(times.tolist()):
        network.evaluate(t, (_X - VELOCITY * t) * (1.0 - following) + NOISE * following)
        network.end_step()
    return network


def rk4(times: Tensor, guidance: Guidance, *, last_time: float = 0.0) -> PlanWriter:
    """The classical Runge-Kutta method of order 4. The last call of a step is at the step's end, or at `last_time` if
    that is later.

    Three registers: x; the network's next input; x plus the weighted slopes of this step so far.
    """
    network = FlowNetwork(3, guidance)
    for current, following in itertools.pairwise(times):
        step = following - current
        middle, end, dt = float(current + step / 2), float(following.clamp(min=last_time)), float(step)
        network.evaluate(float(current), _X, _X + VELOCITY * (dt / 2), _X + VELOCITY * (dt / 6))
        for reach in (dt / 2, dt):
            network.evaluate(middle, _X, _X + VELOCITY * reach, _TOTAL + VELOCITY * (dt / 3), input_register=1)
        network.evaluate(end, _TOTAL + VELOCITY * (dt / 6), input_register=1)
        network.end_step()
    return network


def _dpmpp(times: Tensor, guidance: Guidance) -> PlanWriter:
    """DPM-Solver++ of order 2 for flow models. Registers: x and the clean estimate of the previous step.

    A step from t to t' sets x to (t'/t) x - (1 - t') c D', where c = (t' - t) / ((1 - t') t). D' is extrapolated from
    the clean estimates of the previous and this step. In the first step, in the last step, and where two earlier times
    have the same log-SNR, D' is the clean estimate of this step.
    """
    network = FlowNetwork(2, guidance)
    previous: float | None = None
    for t, following in itertools.pairwise(times.tolist()):
        d = _X - VELOCITY * t
        history = 0.0
        if previous is not None and following != 0.0 and (span := _log_snr(t) - _log_snr(previous)) != 0.0:
            history = 0.5 * (_log_snr(following) - _log_snr(t)) / span
        weight = -(1.0 - following) * (following - t) / (max(1.0 - following, _TINY) * max(t, _TINY))
        network.evaluate(t, _X * (following / t) + d * (weight * (1.0 + history)) - _PREVIOUS * (weight * history), d)
        network.end_step()
        previous = t
    return network


_WRITERS: Mapping[str, FlowSampler] = {
    "euler": euler,
    "rk4": partial(rk4, last_time=_LAST_RK4_TIME),
    "dpmpp": _dpmpp,
    "pingpong": pingpong,
}
SAMPLERS = tuple(_WRITERS)


def _log_snr(time: float) -> float:
    return math.log(max(1.0 - time, _TINY) / max(time, _TINY))
