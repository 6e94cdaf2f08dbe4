"""Rotary positions in half-split form: a channel of the first rotated half is rotated with the same channel of the
second half.

One table normalises and rotates the queries and keys of a layer together: it includes the gain and bias of their norms.
Independent of attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stable_audio_serve.models.blocks.norms import DyT, RMSNorm


class RotaryTable(NamedTuple):
    """Factors of the rotation `u * cos + swapped(u) * sin + shift`, for one layer or each of L layers.

    u are queries and keys, normalised without gain and bias; `swapped` exchanges the two rotated halves. Factors are
    ([L,] positions, 2 or 1, 1, E) float32, queries first. `shift` is None for norms without bias. `rate` ([L,] 2, 1, 1)
    is DyT's factor before its tanh, None for other norms.
    """

    cos: Tensor
    sin: Tensor
    shift: Tensor | None
    rate: Tensor | None
    half: int  # channels in each rotated half

    def layer(self, index: int) -> RotaryTable:
        """Returns the table of one of L layers."""
        shift = None if self.shift is None else self.shift[index]
        rate = None if self.rate is None else self.rate[index]
        return RotaryTable(self.cos[index], self.sin[index], shift, rate, self.half)


class RotaryEmbedding(nn.Module):
    """Frequencies `base^(-2j / rotated)`, in a buffer that the checkpoints contain."""

    inv_freq: Tensor

    def __init__(self, rotated: int, *, base: float = 10000.0) -> None:
        super().__init__()
        exponents = torch.arange(0, rotated, 2).float() / rotated
        self.register_buffer("inv_freq", 1.0 / base**exponents)

    @property
    def half_width(self) -> int:
        """Channels in each rotated half."""
        return len(self.inv_freq)

    def rates(self, width: int) -> Tensor:
        """Returns radians per position (width,) float32 for the channels of a head of this width.

        They are negative in the first half, where `swapped` is subtracted, and zero in channels without rotation.
        """
        rates = self.inv_freq.float()
        return torch.cat([-rates, rates, rates.new_zeros(width - 2 * len(rates))])


@dataclass(frozen=True, slots=True)
class HeadAffine:
    """The gain and bias of the head norms of L layers (or one), in original order and with halves swapped.

    ([L,] 1, 2, 1, E) float32, queries first; None for norms without them. `rate` as in RotaryTable.
    """

    num_layers: int
    gain: Tensor | None
    swapped_gain: Tensor | None
    bias: Tensor | None
    swapped_bias: Tensor | None
    rate: Tensor | None
    half: int

    def layer(self, index: int) -> HeadAffine:
        """Returns the values of one of L layers."""
        parts = self.gain, self.swapped_gain, self.bias, self.swapped_bias, self.rate
        gain, swapped_gain, bias, swapped_bias, rate = (None if part is None else part[index] for part in parts)
        return HeadAffine(1, gain, swapped_gain, bias, swapped_bias, rate, self.half)

    def table(self, positions: Tensor, *, rates: Tensor) -> RotaryTable:
        """Returns the table for `positions` (N,) float32; `rates` is (E,), shared by all layers, or (L, E)."""
        return self.fold(*cosines(positions, rates))

    def fold(self, cos: Tensor, sin: Tensor) -> RotaryTable:
        """Returns the table for the cosines and sines that `cosines` returned."""
        if self.gain is None or self.swapped_gain is None:
            shape = (self.num_layers, *cos.shape[-4:])
            return RotaryTable(cos.expand(shape), sin.expand(shape), None, None, self.half)
        shift = None
        if self.bias is not None and self.swapped_bias is not None:
            shift = torch.addcmul(self.bias * cos, self.swapped_bias, sin)
        return RotaryTable(self.gain * cos, self.swapped_gain * sin, shift, self.rate, self.half)


def cosines(positions: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines ([L,] N, 1, 1, E) of positions (N,) times rates ([L,] E), float32."""
    angles = (positions[:, None] * rates[..., None, :])[..., None, None, :]
    return angles.cos(), angles.sin()


def gather_affine(norms: Sequence[tuple[nn.Module, nn.Module]], *, half: int) -> HeadAffine:
    """Gather the head norms of L layers, given as (query norm, key norm) per layer, all of one kind."""
    flat = [norm for pair in norms for norm in pair]
    gains, biases = _stack([_gain(norm) for norm in flat]), _stack([_bias(norm) for norm in flat])
    rates = torch.cat([norm.alpha for norm in flat if isinstance(norm, DyT)]) if isinstance(flat[0], DyT) else None
    return HeadAffine(
        num_layers=len(norms),
        gain=gains,
        swapped_gain=None if gains is None else swap_halves(gains, half),
        bias=biases,
        swapped_bias=None if biases is None else swap_halves(biases, half),
        rate=None if rates is None else rates.float().view(-1, 2, 1, 1),
        half=half,
    )


def without_affine(norm: nn.Module, x: Tensor, *, rate: Tensor | None) -> Tensor:
    """Normalise queries and keys x (B, N, 2, heads..., E) like `norm`, but without its gain and bias.

    Keeps the dtype, except for DyT: its tanh is computed and returned in the dtype of `rate`.
    """
    if isinstance(norm, RMSNorm):
        return norm.without_gain(x)
    if isinstance(norm, nn.LayerNorm):
        return torch.nn.functional.layer_norm(x, norm.normalized_shape, None, None, norm.eps)
    if not isinstance(norm, DyT):
        return x.contiguous()
    assert rate is not None
    rate = rate.view(2, *(1,) * (x.dim() - 3))
    if torch.is_grad_enabled():
        return (x * rate).contiguous().tanh()
    return torch.mul(x, rate, out=x.new_empty(x.shape, dtype=rate.dtype)).tanh_()


def rotate(x: Tensor, table: RotaryTable, *, dtype: torch.dtype) -> Tensor:
    """Rotate queries and keys x (B, N, 2, H, E) in float32. Returns the same shape in `dtype`."""
    rotated_x = x * table.cos if table.shift is None else torch.addcmul(table.shift, x, table.cos)
    if rotated_x.dtype == dtype and not torch.is_grad_enabled():
        low, high = slice(table.half), slice(table.half, 2 * table.half)
        rotated_x[..., low].addcmul_(x[..., high], table.sin[..., low])
        rotated_x[..., high].addcmul_(x[..., low], table.sin[..., high])
        return rotated_x
    swapped = swap_halves(x.flatten(2, 3), table.half).view(x.shape)  # the fast kernel of `cat` takes at most four axes
    if torch.is_grad_enabled():
        return torch.addcmul(rotated_x, swapped, table.sin).to(dtype)
    return torch.addcmul(rotated_x, swapped, table.sin, out=torch.empty_like(x, dtype=dtype))


def swap_halves(x: Tensor, half: int) -> Tensor:
    """Exchange the first two halves of channels of x (..., E); other channels stay."""
    return torch.cat([x[..., half : 2 * half], x[..., :half], x[..., 2 * half :]], dim=-1)


def _stack(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Stack 2 L vectors (E,) to (L, 1, 2, 1, E) float32."""
    given = [part for part in parts if part is not None]
    return torch.stack(given).float().unflatten(0, (-1, 1, 2, 1)) if given else None


def _gain(norm: nn.Module) -> Tensor | None:
    if isinstance(norm, RMSNorm | DyT):
        return norm.gamma
    return norm.weight if isinstance(norm, nn.LayerNorm) else None


def _bias(norm: nn.Module) -> Tensor | None:
    if isinstance(norm, DyT):
        return norm.beta
    return norm.bias if isinstance(norm, nn.LayerNorm) else None
