"""The gated feed-forward network of a transformer layer: `W_out (value * activation(gate))`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stable_audio_serve.models.blocks.fused import FusedModule


def sine(x: Tensor) -> Tensor:
    """`sin(pi x)`, the activation of the last layers in some decoders."""
    return torch.sin(math.pi * x)


class GatedLinear(FusedModule):
    """Returns `value * activation(gate)`, where one linear layer computes value and gate.

    The activation must return a new tensor, because the product overwrites it.
    """

    def __init__(self, width: int, inner: int, *, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., inner)."""
        both = self.proj(x)
        if self.kernels is not None:
            return self.kernels.gated(both, self.activation)
        value, gate = both.chunk(2, dim=-1)
        activated = self.activation(gate)
        return activated * value if torch.is_grad_enabled() else activated.mul_(value)


class FeedForward(nn.Module):
    """A gated linear unit and then a linear layer, both with bias. Names of submodules match keys of checkpoints."""

    def __init__(self, width: int, *, mult: float, activation: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        inner = int(width * mult)
        gated = GatedLinear(width, inner, activation=activation)
        self.ff = nn.Sequential(gated, nn.Identity(), nn.Linear(inner, width))

    @property
    def first(self) -> nn.Linear:
        """The linear layer that reads the input."""
        gated = self.ff[0]
        assert isinstance(gated, GatedLinear)
        return gated.proj

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return self.ff(x)


def add_branch(h: Tensor, branch: Tensor) -> Tensor:
    """Returns `h + branch`. Overwrites `h` if gradients are disabled, so callers must not use `h` afterwards."""
    return h + branch if torch.is_grad_enabled() else h.add_(branch)
