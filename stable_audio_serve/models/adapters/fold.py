"""Folds a chain of adapters with strengths into a slot: an output scale and a low-rank term for each changed layer.

A chain turns a layer's weight W into `diag(R) W + sum over adapters k of diag(g_k) B_k A_k`. The scale R and the gains
g_k are vectors with one value for each output. Folding a chain with new strengths is therefore cheap: it costs little
more than the multiplication of each B_k with its gain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stable_audio_serve.core.adapters import strength_range
from stable_audio_serve.core.generation import Stacking
from stable_audio_serve.models.adapters.base import Base, FittedAdapter, FittedLayer
from stable_audio_serve.models.adapters.header import CONDITIONERS, AdapterType, refuse_adapter

_LEAST_NORM = 1e-2  # relative to the row norm of the base weight; smaller norms are computed from the row itself
_NORM_OFFSET = 1e-12


class LayerSlot(NamedTuple):
    """What a chain does to one layer: the output y = W x + bias becomes `scale * y + offset + b (a x)`.

    `scale` and `offset` (out,) are float32; `a` (rank, in) and `b` (out, rank) have the weight's dtype. `offset` is
    `(1 - scale) * bias`, so that the bias is not scaled. All tensors are on the weight's device.
    """

    scale: Tensor
    offset: Tensor
    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Slot:
    """A folded chain of adapters: what the chain does to each changed layer. `rank` is the largest rank of a layer."""

    layers: Mapping[str, LayerSlot]
    rank: int
    warnings: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers.values() for tensor in layer)


class _Part(NamedTuple):
    """One adapter's part in a layer."""

    layer: FittedLayer
    scaling: float
    strength: float


class _Chain(NamedTuple):
    """The weight `diag(scale) W + sum of diag(gain) B A` over the parts. All vectors are (out,) float64."""

    scale: Tensor
    gains: tuple[Tensor, ...]


def check_strength(name: str, kind: AdapterType, *, strength: float) -> None:
    """Raise InvalidRequestError unless an adapter of this type may have this strength."""
    low, high = strength_range(kind)
    if not low <= strength <= high:
        allowed = f"{low:g} to {high:g}"
        raise refuse_adapter(name, f"of type {kind} has strength {strength}, allowed: {allowed}", allowed=allowed)


def fold(
    base: Base,
    chain: Sequence[tuple[FittedAdapter, float]],
    *,
    stacking: Stacking = "chained",
    max_rank: int | None = None,
) -> Slot:
    """Fold `chain`, pairs of an adapter and its strength, into a slot. Adapters with strength 0 are left out.

    With the stacking "chained", adapters apply in order, each to the weight as changed by the adapters before it. With
    "summed", each adapter's change of the base weight at strength 1 is multiplied by the adapter's strength, and the
    products are added. Raises InvalidRequestError if a strength is out of range, if the sum of all ranks is above
    `max_rank`, or if values overflow.
    """
    for adapter, strength in chain:
        check_strength(adapter.name, adapter.type, strength=strength)
    chain = [(adapter, strength) for adapter, strength in chain if strength]
    names = "+".join(adapter.name for adapter, _ in chain)
    stacked = sum(adapter.rank for adapter, _ in chain)
    if max_rank is not None and stacked > max_rank:
        raise refuse_adapter(names, f"has a stacked rank of {stacked}, the largest allowed is {max_rank}")
    layers, warnings = {}, []
    for layer in dict.fromkeys(layer for adapter, _ in chain for layer in adapter.layers):
        parts = [
            _Part(adapter.layers[layer], adapter.scaling, strength)
            for adapter, strength in chain
            if layer in adapter.layers
        ]
        layers[layer] = folded = _fold_layer(base, layer, parts=parts, stacking=stacking)
        if not math.isfinite(sum(float(tensor.sum(dtype=torch.float32)) for tensor in folded)):
            raise refuse_adapter(names, f"has values that overflow in {layer}")
        if layer.startswith(CONDITIONERS) and len(parts) > 1:
            warnings.append(f"adapters {names!r}: more than one changes {layer}; together they may render silence")
    return Slot(layers, max((len(one.a) for one in layers.values()), default=0), tuple(warnings))


def _fold_layer(base: Base, layer: str, *, parts: Sequence[_Part], stacking: Stacking) -> LayerSlot:
    chain = (_chain if stacking == "chained" else _sum)(base, layer, parts=parts)
    bias, weights = base.bias(layer), [part.layer for part in parts]
    offset = torch.zeros_like(chain.scale) if bias is None else (1 - chain.scale) * bias
    gained = [one.b * gain.float()[:, None] for one, gain in zip(weights, chain.gains, strict=True)]
    a = weights[0].a if len(weights) == 1 else torch.cat([one.a for one in weights])
    b = (gained[0] if len(gained) == 1 else torch.cat(gained, 1)).to(a.dtype)
    device = base.layers[layer].weight.device  # `base.weight` may be on another one
    return LayerSlot(*(tensor.to(device) for tensor in (chain.scale.float(), offset.float(), a, b)))


def _chain(base: Base, layer: str, *, parts: Sequence[_Part]) -> _Chain:
    scale, gains = torch.ones_like(parts[0].layer.along), []
    for part in parts:
        gains.append(torch.full_like(scale, part.strength * part.scaling))
        if part.layer.magnitude is not None:
            norms = _row_norms(base, layer, chain=_Chain(scale, tuple(gains)), parts=parts[: len(gains)])
            # A row of zeros stays zero whatever its ratio is, but the layer's bias would not survive a huge ratio.
            ratio = torch.where(norms > 0, part.layer.magnitude / (norms + _NORM_OFFSET), 1.0)
            scale, gains = scale * ratio, [gain * ratio for gain in gains]
    return _Chain(scale, tuple(gains))


def _sum(base: Base, layer: str, *, parts: Sequence[_Part]) -> _Chain:
    alone = [_chain(base, layer, parts=[part._replace(strength=1.0)]) for part in parts]
    changes = [part.strength * (one.scale - 1) for part, one in zip(parts, alone, strict=True)]
    gains = [part.strength * one.gains[0] for part, one in zip(parts, alone, strict=True)]
    return _Chain(1 + torch.stack(changes).sum(0), tuple(gains))


def _row_norms(base: Base, layer: str, *, chain: _Chain, parts: Sequence[_Part]) -> Tensor:
    """Returns the row norms (out,) float64 of the changed weight, from scalar products instead of the weight itself.

    Where the adapters almost cancel a row of the base weight, the sum of products loses digits. The norms of such rows
    are computed from the rows themselves.
    """
    scale, gains = chain
    squares = scale.square() * base.squared_norms(layer)
    for index, (part, gain) in enumerate(zip(parts, gains, strict=True)):
        squares += gain * (2 * scale * part.layer.along + gain * part.layer.squares)
        for other, other_gain in zip(parts[:index], gains[:index], strict=True):
            squares += 2 * gain * other_gain * _products(part.layer, other.layer)
    norms = squares.clamp(min=0).sqrt()
    rows = (norms < _LEAST_NORM * base.squared_norms(layer).sqrt()).nonzero()[:, 0]
    if len(rows):
        whole = scale[rows, None] * base.weight(layer)[rows].double()
        for part, gain in zip(parts, gains, strict=True):
            whole += gain[rows, None] * (part.layer.b[rows].double() @ part.layer.a.double())
        norms[rows] = torch.linalg.vector_norm(whole, dim=1)
    return norms


def _products(one: FittedLayer, other: FittedLayer) -> Tensor:
    """Returns the scalar product (out,) float64 of each row of one update with the same row of the other."""
    across = one.a.double() @ other.a.double().T
    return ((one.b.double() @ across) * other.b).sum(1)
