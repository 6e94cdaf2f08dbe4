"""Rotary positions, half-split form: the first rotated half of a head's channels pairs with the second."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class RotaryTable(NamedTuple):
    """Cosines and sines (positions, rotated // 2), float32."""

    cos: Tensor
    sin: Tensor


class RotaryEmbedding(nn.Module):
    """Frequencies `base^(-2j / rotated)`; a stored buffer because the checkpoints carry it."""

    inv_freq: Tensor

    def __init__(self, rotated: int, *, base: float = 10000.0) -> None:
        super().__init__()
        exponents = torch.arange(0, rotated, 2).float() / rotated
        self.register_buffer("inv_freq", 1.0 / base**exponents)

    def forward(self, num_positions: int) -> RotaryTable:
        """Returns the table for positions 0 ... num_positions - 1."""
        positions = torch.arange(num_positions, device=self.inv_freq.device, dtype=torch.float32)
        angles = torch.outer(positions, self.inv_freq.float())
        return RotaryTable(angles.cos(), angles.sin())


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotate the first `2 * table.cos.shape[-1]` channels of x (..., positions, head width); the rest passes through.

    Computed in float32, returned in x's dtype.
    """
    half = table.cos.shape[-1]
    low, high, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    low, high = low.float(), high.float()
    turned = (low * table.cos - high * table.sin, high * table.cos + low * table.sin)
    return torch.cat([turned[0].to(x.dtype), turned[1].to(x.dtype), rest], dim=-1)
