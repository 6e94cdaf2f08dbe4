"""Linear layers on a CPU, multiplied by oneDNN in float32 where torch's own way is slower. Knows no family.

Torch multiplies float32 matrices by MKL, which leaves half of an AMD processor's AVX-512 unused. oneDNN, which comes
with torch, too, does not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from stable_audio_serve.core.processor import is_amd

_LEAST_PRODUCTS = 2**21  # multiplications; oneDNN takes 11 us before it begins


class OneDnnLinear(nn.Linear):
    """A linear layer for inference on a CPU; with gradients, compiled and for small products it is torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.numel() * self.out_features < _LEAST_PRODUCTS:
            return F.linear(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias)


def use_onednn(network: nn.Module) -> None:
    """Let oneDNN multiply in the linear layers of a network on a CPU, in place, where that is faster.

    Weights, keys and hooks stay as they are. Which library multiplies depends on the shapes and the processor alone,
    so that all replicas on a machine make the same bytes.
    """
    if not _is_faster():
        return
    for module in network.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu":
            module.__class__ = OneDnnLinear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: PLR0917  # as torch's function
    """Returns `x @ weight.T + bias` as torch's function does, without gradients. Torch-function modes see it."""
    if has_torch_function_unary(x):
        return handle_torch_function(linear, (x,), x, weight, bias)
    if not takes_onednn(x, weight):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN can multiply these two: float32 on a CPU, and nothing asks for another precision."""
    is_exact = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return is_exact and x.device.type == "cpu"


def _is_faster() -> bool:
    """Whether oneDNN was measured to be faster on such a processor, and this torch offers its product."""
    has_product = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_product and torch.backends.cpu.get_cpu_capability() == "AVX512" and is_amd()
