"""Fourier features of a scalar with geometrically spaced frequencies, for diffusion time and number conditioners."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

LOWEST_HZ, HIGHEST_HZ = 0.5, 1e4


class ExpoFourier(nn.Module):
    """The features `[cos a, sin a]` of x, with `a_j = ((x f_j) 2) pi` and f_j spaced geometrically from 0.5 to 1e4.

    The angles a_j reach 6e4, where adjacent float32 numbers differ by 0.004. Checkpoints were trained with this order
    of multiplications and with float32 frequencies. Another order would change the features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """Returns the features (..., width) of x (...), float32."""
        angles = x.float()[..., None] * _frequencies(self.width // 2, x.device)
        angles = angles * 2 * math.pi
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


@functools.lru_cache(maxsize=32)
def _frequencies(count: int, device: torch.device) -> Tensor:
    """Returns the `count` frequencies, float32, computed on the CPU so that all devices use the same values."""
    with torch.inference_mode(False), torch.device("cpu"):
        ramp = torch.linspace(0, 1, count, dtype=torch.float32)
        low, high = math.log(LOWEST_HZ), math.log(HIGHEST_HZ)
        return torch.exp(ramp * (high - low) + low).to(device)
