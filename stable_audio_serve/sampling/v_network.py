"""Lets samplers over noise levels sigma use a network that was trained to predict v at a time t.

The time of a level is t = 2/pi atan sigma. The clean estimate D at a level, with the network F, is
`D(x, sigma) = x / (sigma**2 + 1) - F(x / sqrt(sigma**2 + 1), t) sigma / sqrt(sigma**2 + 1)`. This combines "Progressive
Distillation for Fast Sampling of Diffusion Models" (arXiv 2202.00512), which defines v, with the notation of
"Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stable_audio_serve.sampling.plan import Guidance
from stable_audio_serve.sampling.terms import VELOCITY, PlanWriter, Terms, register


def sigma_to_time(sigmas: Tensor) -> Tensor:
    """Return the time 2/pi atan sigma of each noise level, computed in the same order as in the reference
    implementations. Float32, any shape.
    """
    return sigmas.atan() / math.pi * 2


class VNetwork(PlanWriter):
    """Collects network calls at noise levels. `denoised` and `slope` return formulas for updates after a call."""

    def __init__(self, num_registers: int, guidance: Guidance) -> None:
        super().__init__(num_registers)
        self._guidance = guidance

    def denoised(self, sigma: float, *, input_register: int = 0) -> Terms:
        """Return the formula of the clean estimate D(x, sigma), where x is `input_register`."""
        variance = sigma * sigma + 1.0
        return register(input_register) / variance - VELOCITY * (sigma / math.sqrt(variance))

    def slope(self, sigma: float, *, input_register: int = 0) -> Terms:
        """Return the formula of the slope dx/dsigma = (x - D(x, sigma)) / sigma, where x is `input_register`.

        The slope equals the predicted noise.
        """
        return (register(input_register) - self.denoised(sigma, input_register=input_register)) / sigma

    def evaluate(self, sigma: float, *targets: Terms, input_register: int = 0) -> None:
        """Add one network call, whose input is `input_register`. Afterwards the registers are set to `targets`.

        `sigma` is a float32 value. The network's time is computed in float32, as in the reference implementations.
        """
        level = torch.tensor(sigma, dtype=torch.float32)
        time = float(sigma_to_time(level))
        scale = float(1 / (level**2 + 1.0) ** 0.5)
        self.call(
            *targets,
            t=time,
            sigma=sigma,
            guided=is_v_guided(self._guidance, time),
            input_register=input_register,
            input_scale=scale,
        )


def is_v_guided(guidance: Guidance, time: float) -> bool:
    """Return whether the evaluation at time t is guided: `cfg_scale` is not 1, and sin(pi t / 2) is within the interval
    of `guidance`.

    The comparison is in float32, as in the reference implementations.
    """
    low, high = torch.tensor(guidance.interval, dtype=torch.float32).tolist()
    noise_share = float(torch.sin(torch.tensor(time, dtype=torch.float32) * math.pi / 2))
    return guidance.cfg_scale != 1.0 and low <= noise_share <= high
