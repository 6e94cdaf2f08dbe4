"""Use of a network trained for v over noise levels sigma: its time, input and clean estimate at a level.

With F the network, `D(x, sigma) = x / (sigma**2 + 1) - F(x / sqrt(sigma**2 + 1), 2/pi atan sigma) sigma / sqrt(sigma**2
+ 1)`: "Progressive Distillation for Fast Sampling of Diffusion Models" (arXiv 2202.00512) in the terms of "Elucidating
the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364). Independent of samplers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stable_audio_serve.sampling.plan import Guidance
from stable_audio_serve.sampling.terms import VELOCITY, PlanWriter, Terms, register


def sigma_to_time(sigmas: Tensor) -> Tensor:
    """Return the time 2/pi atan sigma of each level, in the references' order of operations. Float32, any shape."""
    return sigmas.atan() / math.pi * 2


class VNetwork:
    """Writes evaluations at noise levels. `denoised` and `slope` return terms for the next evaluation."""

    def __init__(self, writer: PlanWriter, guidance: Guidance) -> None:
        self._writer = writer
        self._guidance = guidance

    def denoised(self, sigma: float, *, input_register: int = 0) -> Terms:
        """Return D(x, sigma), with x in `input_register`."""
        variance = sigma * sigma + 1.0
        return register(input_register) / variance - VELOCITY * (sigma / math.sqrt(variance))

    def slope(self, sigma: float, *, input_register: int = 0) -> Terms:
        """Return (x - D(x, sigma)) / sigma: dx/dsigma, which equals the predicted noise; x is in `input_register`."""
        return (register(input_register) - self.denoised(sigma, input_register=input_register)) / sigma

    def evaluate(self, sigma: float, *targets: Terms, input_register: int = 0) -> None:
        """Add one network call on `input_register`, after which the registers become `targets`.

        `sigma` is a float32 value; the network's time is computed in float32 as in the references.
        """
        level = torch.tensor(sigma, dtype=torch.float32)
        time = float(sigma_to_time(level))
        scale = float(1 / (level**2 + 1.0) ** 0.5)
        self._writer.evaluate(
            *targets,
            t=time,
            sigma=sigma,
            guided=is_v_guided(self._guidance, time),
            input_register=input_register,
            input_scale=scale,
        )

    def end_step(self) -> None:
        """End the current requested step; later evaluations belong to the next one."""
        self._writer.end_step()


def is_v_guided(guidance: Guidance, time: float) -> bool:
    """Return whether the evaluation at `time` is guided: `cfg_scale` is not 1 and sin(pi t / 2) is in the interval.

    The comparison is in float32, as in the references.
    """
    low, high = torch.tensor(guidance.interval, dtype=torch.float32).tolist()
    noise_share = float(torch.sin(torch.tensor(time, dtype=torch.float32) * math.pi / 2))
    return guidance.cfg_scale != 1.0 and low <= noise_share <= high
