"""Noise levels sigma for samplers over sigma: a range of levels, and the polyexponential schedule over this range.

All arithmetic is float32 and in the same order as in the reference implementations, because even the last bit of a
level makes a difference in the network's time features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.sampling.schedules import check_steps

LOWEST_SIGMA, HIGHEST_SIGMA = 1e-4, 1e4
MAX_RHO = 100.0


@dataclass(frozen=True, slots=True)
class SigmaRange:
    """The highest and the lowest noise level, and the spacing `rho` of the levels between them (1: even in ln sigma).

    Raises InvalidRequestError if `sigma_min` or `rho` is invalid, or if `sigma_max` is not larger than `sigma_min`.
    """

    sigma_min: float
    sigma_max: float
    rho: float = 1.0

    def __post_init__(self) -> None:
        allowed = f"{LOWEST_SIGMA:g}..{HIGHEST_SIGMA:g}"
        for field, value in (("sigma_max", self.sigma_max), ("sigma_min", self.sigma_min)):
            if not LOWEST_SIGMA <= value <= HIGHEST_SIGMA:
                raise InvalidRequestError(f"{field} must be in {allowed}, got {value}", field=field, allowed=allowed)
        if not self.sigma_min < self.sigma_max:
            message = f"sigma_max {self.sigma_max:g} must be above sigma_min {self.sigma_min:g}"
            raise InvalidRequestError(message, field="sigma_max", allowed=f"above {self.sigma_min:g}")
        if not 0.0 < self.rho <= MAX_RHO:
            allowed = f"above 0, at most {MAX_RHO:g}"
            raise InvalidRequestError(f"rho must be {allowed}, got {self.rho}", field="rho", allowed=allowed)


def polyexponential_sigmas(steps: int, span: SigmaRange) -> Tensor:
    """Return the noise levels of a run of `steps` steps: (steps + 1,) float32, descending to 0.

    The levels before the last are exp(r (ln max - ln min) + ln min), where r = linspace(1, 0)**rho. This is the
    schedule of Stable Audio Open. Raises InvalidRequestError if `steps` is out of range, or if `rho` makes two levels
    equal.
    """
    check_steps(steps)
    ramp = torch.linspace(1, 0, steps, dtype=torch.float32) ** span.rho
    low, high = math.log(span.sigma_min), math.log(span.sigma_max)
    levels = torch.exp(ramp * (high - low) + low)
    if not (levels[:-1] > levels[1:]).all():
        message = f"these sigma_min, sigma_max and rho leave two equal noise levels in {len(levels)} steps"
        raise InvalidRequestError(message, field="rho")
    return torch.cat([levels, levels.new_zeros(1)])
