"""Which layers use the fused GPU kernels of `blocks.kernels`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

Table = tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]  # a `RotaryTable`


class Kernels(Protocol):
    """The functions of the module `blocks.kernels`."""

    def modulated_norm(self, x: Tensor, *, scale: Tensor, shift: Tensor, rows: Tensor | None, eps: float) -> Tensor: ...

    def add_gated(self, h: Tensor, update: Tensor, *, gate: Tensor, rows: Tensor | None) -> Tensor: ...

    def rotated_heads(self, parts: Tensor, *, norm: nn.Module, table: Table) -> tuple[Tensor, Tensor]: ...

    def normed_heads(self, x: Tensor, *, gamma: Tensor, eps: float) -> Tensor: ...

    def has_local_attention(self, q: Tensor) -> bool: ...

    def local_attention(self, q: Tensor, k: Tensor, v: Tensor, *, radius: int) -> Tensor: ...  # noqa: PLR0917

    def squashed(self, x: Tensor, alpha: Tensor) -> Tensor: ...

    def add(self, x: Tensor, update: Tensor) -> Tensor: ...

    def add_squashed(self, x: Tensor, update: Tensor, *, alpha: Tensor) -> Tensor: ...

    def gated(self, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor: ...


class FusedModule(nn.Module):
    """A module that calls fused kernels if it has any."""

    kernels: Kernels | None = None


def use_kernels(net: nn.Module, kernels: Kernels | None) -> None:
    """Make all modules of a network use these kernels from now on; None: torch's operations."""
    for module in net.modules():
        if isinstance(module, FusedModule):
            module.kernels = kernels
