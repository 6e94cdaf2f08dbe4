"""Normalisation layers of the model families: RMS norm, unit norm, DyT, and the per-head norms of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stable_audio_serve.models.blocks.fused import FusedModule


class RMSNorm(nn.Module):
    """`gamma * x / sqrt(mean(x^2) + eps)` over the last axis.

    Computed in float32 for every input dtype: in half precision the mean of squares could overflow.
    """

    gamma: Tensor

    def __init__(self, width: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalised x (..., width), in the dtype of x."""
        # Cast gamma: torch uses its fused CUDA kernel only if gamma and x have the same dtype.
        return F.rms_norm(x, x.shape[-1:], self.gamma.to(x.dtype), self.eps)

    def without_gain(self, x: Tensor) -> Tensor:
        """Returns the normalised x (..., width), not multiplied by gamma, in the dtype of x."""
        return F.rms_norm(x, x.shape[-1:], None, self.eps)


_SHORTEST = 1e-6  # `UnitNorm` makes vectors shorter than this shorter than 1


class UnitNorm(RMSNorm):
    """Scales x to length 1 over the last axis. The gain is fixed: an RMS norm would scale x to length sqrt(width)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=_SHORTEST**2 / width)
        del self.gamma
        # Has values also where parameters are on the meta device, because no checkpoint contains it.
        self.register_buffer("gamma", torch.full((width,), width**-0.5, device="cpu"), persistent=False)


class DyT(FusedModule):
    """Dynamic tanh, a norm without statistics: `gamma * tanh(alpha * x) + beta` with a scalar alpha."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.gamma: nn.Parameter | None = nn.Parameter(torch.ones(width))
        self.beta: nn.Parameter | None = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalised x (..., width), in the dtype of x; with fused kernels, in the dtype of autocast."""
        if self.gamma is None or self.beta is None:
            return (self.alpha * x).tanh_() if self.kernels is None else self.kernels.squashed(x, self.alpha)
        squashed = (self.alpha * x).tanh_()
        return torch.addcmul(self.beta, self.gamma, squashed)

    def after_adding(self, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `x + update` and its norm. With fused kernels, overwrites x if gradients are disabled."""
        if self.kernels is None or torch.is_grad_enabled():
            x = x + update
            return x, self(x)
        if self.gamma is None:
            return x, self.kernels.add_squashed(x, update, alpha=self.alpha)
        self.kernels.add(x, update)
        return x, self(x)

    def fold_into(self, layer: nn.Linear) -> None:
        """Move gamma and beta into the weight and bias of `layer`, which must be the only reader of this norm's output.

        For inference only.
        """
        if self.gamma is None or self.beta is None:
            return
        weight = layer.weight.float()
        bias = weight @ self.beta
        layer.bias = _fixed(bias if layer.bias is None else bias + layer.bias, dtype=layer.weight.dtype)
        layer.weight = _fixed(weight * self.gamma, dtype=layer.weight.dtype)
        self.gamma = self.beta = None


def _fixed(values: Tensor, *, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(values.to(dtype), requires_grad=False)


HEAD_NORMS = ("none", "rms", "ln", "dyt", "l2")


def build_head_norm(kind: str, width: int) -> nn.Module:
    """Returns a norm for each head's queries or keys, applied before the rotary embedding.

    `kind` is one of HEAD_NORMS; `width` is the head width.
    """
    match kind:
        case "none":
            return nn.Identity()
        case "rms":
            return RMSNorm(width, eps=1e-6)
        case "ln":
            return nn.LayerNorm(width, eps=1e-6)
        case "dyt":
            return DyT(width)
        case "l2":
            return UnitNorm(width)
        case _:
            raise ValueError(f"unknown head norm {kind!r}; known: {', '.join(HEAD_NORMS)}")
