"""Which layers use the fused GPU kernels of `blocks.kernels`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor, nn

Table = tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]  # a `RotaryTable`


class Places(NamedTuple):
    """To which row each token belongs, and which tokens are frames.

    Of packed rows, `rows` (tokens,) has the row of each token, and `is_frame` (tokens,) bool is false for the tokens
    before a row's frames. Both are None if rows are padded; the first `num_prefix` tokens of a row are then no frames.
    """

    rows: Tensor | None
    is_frame: Tensor | None
    num_prefix: int


class Kernels(Protocol):
    """The functions of the module `blocks.kernels`."""

    def add_and_norm(
        self,
        h: Tensor,
        update: Tensor | None,
        *,
        gate: Tensor | None,
        local: Tensor | None,
        scale: Tensor,
        shift: Tensor | None,
        places: Places,
        eps: float,
    ) -> Tensor: ...

    def rotated_heads(
        self, parts: Tensor, *, norm: nn.Module, table: Table, repeats_values: bool
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def normed_heads(self, x: Tensor, *, gamma: Tensor, eps: float) -> Tensor: ...

    def has_local_attention(self, q: Tensor) -> bool: ...

    def local_attention(self, q: Tensor, k: Tensor, v: Tensor, *, radius: int) -> Tensor: ...  # noqa: PLR0917

    def difference(self, x: Tensor) -> Tensor: ...

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
