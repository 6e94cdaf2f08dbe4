"""The samplers of flow models. Each turns the schedule of one clip into a plan of network calls and updates.

Coefficients are float64, computed from float32 times. In the formulas a step goes from time t to time t', v is the
network's velocity at (x, t), and D = x - t v is the clean estimate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.sampling.plan import Evaluation, Guidance, SamplerPlan

# Samplers of other programs that choose their step sizes while they run. They are refused, because a plan is made in
# advance.
DATA_DEPENDENT = ("k-dpm-adaptive", "dpm-adaptive")

_TINY = 1e-10  # denominators t and 1 - t' are at least this, as in the reference implementations
_LAST_RK4_TIME = 1e-5  # RK4 calls the network at this time instead of t = 0

_Guided = Callable[[float], bool]
# The number of registers, the evaluations, and for each step the number of evaluations after which it is complete.
_Plan = tuple[int, Sequence[Evaluation], Sequence[int]]


def build_plan(sampler: str, sigmas: Tensor, *, guidance: Guidance, has_source: bool) -> SamplerPlan:
    """Return the plan of `sampler` for one clip with the schedule `sigmas` (steps + 1,) float32, which ends at 0.

    The initial latents are noise, or with a source (1 - sigmas[0]) source + sigmas[0] noise. An evaluation is guided if
    `cfg_scale` is not 1 and its time is within the interval of `guidance`. The comparison is in float32, as in the
    reference implementations. Raises InvalidRequestError if the name `sampler` is unknown.
    """
    times = sigmas.to(torch.float32)
    num_registers, evaluations, step_ends = resolve_sampler(sampler)(times, guided_times(guidance))
    level = float(times[0])
    return SamplerPlan(
        num_registers=num_registers,
        source_scale=1.0 - level if has_source else 0.0,
        noise_scale=level if has_source else 1.0,
        evaluations=tuple(evaluations),
        step_ends=tuple(step_ends),
    )


def resolve_sampler(name: str) -> Callable[[Tensor, _Guided], _Plan]:
    """Return the function that makes plans of the sampler `name`.

    Raises InvalidRequestError, with the names of all samplers, if there is no such sampler.
    """
    builder = _BUILDERS.get(name)
    if builder is not None:
        return builder
    raise refused_sampler(name, SAMPLERS)


def refused_sampler(name: str, samplers: Sequence[str]) -> InvalidRequestError:
    """Return the error for a sampler name that is not in `samplers`. Names in DATA_DEPENDENT get another message."""
    valid = ", ".join(samplers)
    if name in DATA_DEPENDENT:
        message = f"sampler_type {name!r} chooses its steps from the data and is not offered; valid: {valid}"
    else:
        message = f"unknown sampler_type {name[:40]!r}; valid: {valid}"
    return InvalidRequestError(message, field="sampler_type", allowed=valid)


def _euler(times: Tensor, guided: _Guided) -> _Plan:
    """Euler's method: a step from t to t' sets x to x + (t' - t) v, where v is the velocity."""
    evaluations = [_evaluation(t, guided, a=((1.0,),), b=(following - t,)) for t, following in _pairs(times)]
    return 1, evaluations, range(1, len(evaluations) + 1)


def _pingpong(times: Tensor, guided: _Guided) -> _Plan:
    """Ping-pong: a step to time t' sets x to (1 - t') D + t' eps, where D is the clean estimate and eps fresh noise.
    The last step draws noise too, although its weight is 0.
    """
    evaluations = [
        _evaluation(t, guided, a=((1.0 - following,),), b=(-(1.0 - following) * t,), c=(following,), draws_noise=True)
        for t, following in _pairs(times)
    ]
    return 1, evaluations, range(1, len(evaluations) + 1)


def _dpmpp(times: Tensor, guided: _Guided) -> _Plan:
    """DPM-Solver++ of order 2 for flow models. Registers: x and the clean estimate of the previous step.

    A step from t to t' sets x to (t'/t) x - (1 - t') c D', where c = (t' - t) / ((1 - t') t). D' is extrapolated from
    the clean estimates of the previous and this step. In the first step, in the last step, and where two earlier times
    have the same log-SNR, D' is the clean estimate of this step.
    """
    evaluations: list[Evaluation] = []
    previous: float | None = None
    for t, following in _pairs(times):
        scale = following / t
        weight = -(1.0 - following) * (following - t) / (max(1.0 - following, _TINY) * max(t, _TINY))
        history = 0.0
        if previous is not None and following != 0.0 and (span := _log_snr(t) - _log_snr(previous)) != 0.0:
            history = 0.5 * (_log_snr(following) - _log_snr(t)) / span
        on_estimate = weight * (1.0 + history)
        evaluations.append(
            _evaluation(
                t,
                guided,
                a=((scale + on_estimate, -weight * history), (1.0, 0.0)),
                b=(-on_estimate * t, -t),
            )
        )
        previous = t
    return 2, evaluations, range(1, len(evaluations) + 1)


def _rk4(times: Tensor, guided: _Guided) -> _Plan:
    """The classical Runge-Kutta method of order 4.

    Three registers: x; the network's next input; x plus the weighted slopes of this step so far.
    """
    evaluations: list[Evaluation] = []
    for current, following in itertools.pairwise(times):
        step = following - current
        middle, end = float(current + step / 2), float((current + step).clamp(min=_LAST_RK4_TIME))
        dt, x, point, total = float(step), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
        evaluations += [
            _evaluation(float(current), guided, a=(x, x, x), b=(0.0, dt / 2, dt / 6)),
            _evaluation(middle, guided, a=(x, x, total), b=(0.0, dt / 2, dt / 3), input_register=1),
            _evaluation(middle, guided, a=(x, x, total), b=(0.0, dt, dt / 3), input_register=1),
            _evaluation(end, guided, a=(total, point, total), b=(dt / 6, 0.0, 0.0), input_register=1),
        ]
    return 3, evaluations, range(4, len(evaluations) + 1, 4)


_BUILDERS: dict[str, Callable[[Tensor, _Guided], _Plan]] = {
    "euler": _euler,
    "rk4": _rk4,
    "dpmpp": _dpmpp,
    "pingpong": _pingpong,
}
SAMPLERS = tuple(_BUILDERS)


def _evaluation(
    time: float,
    guided: _Guided,
    *,
    a: tuple[tuple[float, ...], ...],
    b: tuple[float, ...],
    c: tuple[float, ...] | None = None,
    input_register: int = 0,
    draws_noise: bool = False,
) -> Evaluation:
    zeros = (0.0,) * len(b)
    return Evaluation(
        t=time,
        sigma=time,
        input_register=input_register,
        input_scale=1.0,
        guided=guided(time),
        a=a,
        b=b,
        b_uncond=zeros,
        c=c or zeros,
        draws_noise=draws_noise,
    )


def _pairs(times: Tensor) -> list[tuple[float, float]]:
    values: list[float] = times.tolist()
    return list(itertools.pairwise(values))


def guided_times(guidance: Guidance) -> _Guided:
    """Return a function that, given a time, returns whether a flow model's evaluation at that time is guided.

    The time and the interval of `guidance` are compared in float32, as in the reference implementations.
    """
    low, high = torch.tensor(guidance.interval, dtype=torch.float32).tolist()
    return lambda time: guidance.cfg_scale != 1.0 and low <= time <= high


def _log_snr(time: float) -> float:
    return math.log(max(1.0 - time, _TINY) / max(time, _TINY))
