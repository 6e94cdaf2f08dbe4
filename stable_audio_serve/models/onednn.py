"""Float32 linear layers on a CPU that use oneDNN where it is faster than torch's default.

Torch multiplies float32 matrices with MKL, which leaves half of an AMD processor's AVX-512 unused. The oneDNN build
inside torch uses all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from stable_audio_serve.core.processor import is_amd

# Smallest number of multiplications for which a layer uses oneDNN. Each oneDNN call has 11 us of overhead.
_LEAST_PRODUCTS = 2**21


class OneDnnLinear(nn.Linear):
    """A linear layer that uses oneDNN for CPU inference.

    With gradients, under `torch.compile` and for small matrices it computes like `nn.Linear`.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.numel() * self.out_features < _LEAST_PRODUCTS:
            return F.linear(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias)


def use_onednn(network: nn.Module) -> None:
    """Make the linear layers of a network on a CPU use oneDNN where oneDNN is faster. Changes the layers in place.

    Weights, state-dict keys and hooks are unchanged. The choice between oneDNN and torch's default depends only on
    shapes and the processor, so that all replicas on a machine produce the same bytes.
    """
    if not _is_faster():
        return
    for module in network.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu":
            module.__class__ = OneDnnLinear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: PLR0917  # torch's signature
    """Returns `x @ weight.T + bias`, like `F.linear` but without gradients. A TorchFunctionMode can intercept it."""
    if has_torch_function_unary(x):
        return handle_torch_function(linear, (x,), x, weight, bias)
    if not supports_onednn(x, weight):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def supports_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN can compute `x @ weight.T`: both are float32 on a CPU, and autocast is off."""
    is_exact = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return is_exact and x.device.type == "cpu"


def _is_faster() -> bool:
    """Whether torch has oneDNN's linear layer and the processor is an AMD one with AVX-512, where oneDNN is faster."""
    has_product = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_product and torch.backends.cpu.get_cpu_capability() == "AVX512" and is_amd()
