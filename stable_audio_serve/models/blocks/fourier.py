"""Exponentially spaced Fourier features of a scalar, for diffusion time and number conditioners."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

LOWEST_HZ, HIGHEST_HZ = 0.5, 1e4


class ExpoFourier(nn.Module):
    """`[cos a, sin a]` with `a_j = ((x f_j) 2) pi` and f_j spaced geometrically from 0.5 to 1e4.

    Arguments reach 6e4, where one float32 step is 0.004. Checkpoints were trained with this order of multiplications
    and with float32 frequencies, so both must stay.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"Fourier features need an even width, got {width}")
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """Returns features (..., width) float32 of x (...), computed in float32."""
        angles = x.float()[..., None] * _frequencies(self.width // 2, x.device)
        angles = angles * 2 * math.pi
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


@functools.lru_cache(maxsize=32)
def _frequencies(count: int, device: torch.device) -> Tensor:
    """Returns (count,) float32, computed on the CPU so that all devices use the same values."""
    with torch.inference_mode(False), torch.device("cpu"):
        ramp = torch.linspace(0, 1, count, dtype=torch.float32)
        low, high = math.log(LOWEST_HZ), math.log(HIGHEST_HZ)
        return torch.exp(ramp * (high - low) + low).to(device)
