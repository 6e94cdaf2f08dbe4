"""Noise levels for models sampled over sigma: a range of sigma, and the polyexponential grid over it.

All arithmetic is float32 in the references' order of operations, because the network's time features amplify the last
bit of a level. Independent of samplers and of the conversion from level to time.
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
    """A row's highest and lowest noise level, and the spacing of the levels between (`rho` 1: even in ln sigma).

    Raises InvalidRequestError on `sigma_min`, on `sigma_max` if it is not larger than `sigma_min`, and on `rho`.
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
    """Return exp(r (ln max - ln min) + ln min) with r = linspace(1, 0)**rho, then 0; (steps + 1,) float32.

    This is the grid of Stable Audio Open. Raises InvalidRequestError on `steps`, and on `rho` if two levels coincide.
    """
    check_steps(steps)
    ramp = torch.linspace(1, 0, steps, dtype=torch.float32) ** span.rho
    low, high = math.log(span.sigma_min), math.log(span.sigma_max)
    return _append_zero(torch.exp(ramp * (high - low) + low))


def _append_zero(levels: Tensor) -> Tensor:
    """Append a final 0. Raises InvalidRequestError if two levels are equal, because a step needs a nonzero length."""
    if not (levels[:-1] > levels[1:]).all():
        message = f"these sigma_min, sigma_max and rho leave two equal noise levels in {len(levels)} steps"
        raise InvalidRequestError(message, field="rho")
    return torch.cat([levels, levels.new_zeros(1)])
