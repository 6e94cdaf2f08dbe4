"""Parts of the networks of text encoders: activations, and half-precision products that are fast on every CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stable_audio_serve.core.processor import has_native_bfloat16

MAX_VOCABULARY = 2**21  # tokens


def _gelu_new(x: Tensor) -> Tensor:
    """The formula that `gelu` with `approximate="tanh"` computes, with the roundings of separate operations."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


# The activations of text encoders, by their name in a config.json.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_new,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Returns `a @ b`. If `is_slow` for their dtype, computes the product in float32 and rounds it once."""
    return (a.float() @ b.float()).to(a.dtype) if is_slow(a) else a @ b


class Linear(nn.Linear):
    """A linear layer that computes like `multiply`. The weights keep their dtype, so they can stay memory-mapped."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_slow(x):
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)


def is_slow(x: Tensor) -> bool:
    """Whether `x` is on a CPU that has no instructions for its dtype, or may have none.

    Torch's products, which also sum in float32, take about seven times as long there as in float32.
    """
    return x.device.type == "cpu" and (x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and not _has_bfloat16()))


_has_bfloat16 = cache(has_native_bfloat16)
