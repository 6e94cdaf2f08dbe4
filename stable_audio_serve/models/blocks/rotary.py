"""Rotary positions in half-split form: channel i of the first rotated half is rotated with channel i of the second.

A table of rotation factors also includes the gain and bias of the norms of queries and keys, so that the operation that
rotates queries and keys also applies gain and bias. Independent of attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stable_audio_serve.models.blocks.norms import DyT, RMSNorm


class RotaryTable(NamedTuple):
    """The factors of the rotation `u * cos + swapped(u) * sin + shift`, for one layer or for several layers.

    u is a query or a key, normalised without the gain and bias of its norm. `swapped(u)` exchanges the two rotated
    halves of u. Factors are float32 of shape ([layers,] positions, 2, 1, head width), where axis 2 has the queries'
    factor and then the keys' (only one if they are equal). `shift` is None for norms without bias. `rate`
    ([layers,] 2, 1, 1) is alpha in the tanh of the norm DyT; None for other norms.
    """

    cos: Tensor
    sin: Tensor
    shift: Tensor | None
    rate: Tensor | None
    half: int  # channels in each rotated half

    def layer(self, index: int) -> RotaryTable:
        """Returns the table of one layer, from the table of several layers."""
        shift = None if self.shift is None else self.shift[index]
        rate = None if self.rate is None else self.rate[index]
        return RotaryTable(self.cos[index], self.sin[index], shift, rate, self.half)


class RotaryEmbedding(nn.Module):
    """The frequencies `base^(-2j / rotated)` for `rotated` channels of a head, in a buffer that checkpoints contain."""

    inv_freq: Tensor

    def __init__(self, rotated: int, *, base: float = 10000.0) -> None:
        super().__init__()
        # A list, because arithmetic on the meta device would import torch's compiler, which takes a second.
        self.register_buffer("inv_freq", torch.tensor([base ** (-2 * j / rotated) for j in range((rotated + 1) // 2)]))

    @property
    def half_width(self) -> int:
        """Returns the number of channels in each rotated half."""
        return len(self.inv_freq)

    def rates(self, width: int) -> Tensor:
        """Returns the rotation per position in radians, (width,) float32, for each channel of a head of this width.

        The rates of the first rotated half are negative, because the rotation subtracts the sine there. Channels
        that are not rotated have rate 0.
        """
        rates = self.inv_freq.float()
        return torch.cat([-rates, rates, rates.new_zeros(width - 2 * len(rates))])


@dataclass(frozen=True, slots=True)
class HeadAffine:
    """The gain and bias of the query and key norms of one or several layers.

    Gain and bias are each stored twice: in the original channel order, and with the two rotated halves swapped. Shapes
    are ([layers,] 1, 2, 1, head width) float32, where axis -3 has queries, then keys. A tensor is None if norms have
    no such parameter. `rate` is as in RotaryTable.
    """

    num_layers: int
    gain: Tensor | None
    swapped_gain: Tensor | None
    bias: Tensor | None
    swapped_bias: Tensor | None
    rate: Tensor | None
    half: int

    def layer(self, index: int) -> HeadAffine:
        """Returns the gain and bias of one of several layers."""
        parts = self.gain, self.swapped_gain, self.bias, self.swapped_bias, self.rate
        gain, swapped_gain, bias, swapped_bias, rate = (None if part is None else part[index] for part in parts)
        return HeadAffine(1, gain, swapped_gain, bias, swapped_bias, rate, self.half)

    def table(self, positions: Tensor, *, rates: Tensor) -> RotaryTable:
        """Returns the rotary table for `positions` (tokens,) float32.

        `rates` is (head width,) if all layers share it, else (layers, head width).
        """
        return self.fold(*cosines(positions, rates))

    def fold(self, cos: Tensor, sin: Tensor) -> RotaryTable:
        """Returns the rotary table for the cosines and sines that the function `cosines` returns."""
        if self.gain is None or self.swapped_gain is None:
            shape = (self.num_layers, *cos.shape[-4:])
            return RotaryTable(cos.expand(shape), sin.expand(shape), None, None, self.half)
        shift = None
        if self.bias is not None and self.swapped_bias is not None:
            shift = torch.addcmul(self.bias * cos, self.swapped_bias, sin)
        return RotaryTable(self.gain * cos, self.swapped_gain * sin, shift, self.rate, self.half)


def cosines(positions: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the cosines and the sines of positions (tokens,) times rates ([layers,] head width).

    Both results are float32 of shape ([layers,] tokens, 1, 1, head width).
    """
    angles = (positions[:, None] * rates[..., None, :])[..., None, None, :]
    return angles.cos(), angles.sin()


def gather_affine(norms: Sequence[tuple[nn.Module, nn.Module]], *, half: int) -> HeadAffine:
    """Returns the gain and bias of all layers' (query norm, key norm) pairs. All norms must be of one kind.

    `half` is the number of channels in each rotated half.
    """
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
    """Returns queries and keys x (batch, tokens, 2, heads..., head width), normalised without the norm's gain and bias.

    The result has the dtype of x; for the norm DyT, it has the dtype of `rate`.
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
    """Returns queries and keys x (batch, tokens, 2, heads, head width), rotated in float32 and cast to `dtype`."""
    rotated_x = x * table.cos if table.shift is None else torch.addcmul(table.shift, x, table.cos)
    # On a GPU, a cast costs a kernel of its own. On a CPU, the branch below would need two more copies of x.
    if not torch.is_grad_enabled() and (rotated_x.dtype == dtype or x.device.type == "cpu"):
        low, high = slice(table.half), slice(table.half, 2 * table.half)
        rotated_x[..., low].addcmul_(x[..., high], table.sin[..., low])
        rotated_x[..., high].addcmul_(x[..., low], table.sin[..., high])
        return rotated_x.to(dtype)
    swapped = swap_halves(x.flatten(2, 3), table.half).view(x.shape)  # four axes: more disable `cat`'s fast kernel
    if torch.is_grad_enabled():
        return torch.addcmul(rotated_x, swapped, table.sin).to(dtype)
    return torch.addcmul(rotated_x, swapped, table.sin, out=torch.empty_like(x, dtype=dtype))


def swap_halves(x: Tensor, half: int) -> Tensor:
    """Returns x (..., channels) with channels [0, half) and [half, 2 half) exchanged; other channels stay."""
    return torch.cat([x[..., half : 2 * half], x[..., :half], x[..., 2 * half :]], dim=-1)


def _stack(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Stack vectors (query, key, query, key, ...; one pair per layer) to (layers, 1, 2, 1, head width) float32."""
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
