"""Applies slots to the outputs of linear layers, for batches whose rows have different slots.

The layer itself runs once for all rows, without slots. A unit is a row of a padded batch, or a token of a packed one.
For a 1x1 convolution, the caller moves the channels to the last axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stable_audio_serve.models.adapters.fold import LayerSlot, Slot


def adapt(out: Tensor, x: Tensor, *, groups: Iterable[tuple[slice, LayerSlot]]) -> Tensor:
    """Returns the output `out` (units, ..., out) of a linear layer, with the slot of each group of units applied.

    `x` (units, ..., in) is the layer's input. `out` must be contiguous and is overwritten. Units in no group keep their
    bytes, and the bytes of a group do not depend on other groups. Inference only.
    """
    for units, slot in groups:
        part, inner = out[units], F.linear(x[units], slot.a)
        if part.dtype == slot.scale.dtype:  # in place, because on a CPU every pass over the output takes time
            torch.addcmul(slot.offset, part, slot.scale, out=part)
            part.view(-1, part.shape[-1]).addmm_(inner.flatten(0, -2), slot.b.T)
        else:
            part.copy_(part * slot.scale + slot.offset + F.linear(inner, slot.b))
    return out


class RowSlots:
    """The slots of the rows of one network call."""

    def __init__(self, slots: Sequence[tuple[slice, Slot]], *, frames: Sequence[int] = (), num_prefix: int = 0) -> None:
        """`slots` are pairs of adjacent rows of the network's batch and their slot; rows in no pair are plain.

        In a packed call, `frames` has the latent frames of each row. The network adds `num_prefix` tokens to each row.
        """
        self.slots = slots
        self._by_length = {
            sum(frames) + num_prefix * len(frames): _places(slots, [own + num_prefix for own in frames]),
            sum(frames): _places(slots, frames),
        }
        self._is_packed = bool(frames)

    def places(self, x: Tensor) -> Sequence[slice]:
        """Returns the units of each slot in the input `x` of a linear layer: rows, or the tokens of packed rows."""
        if not self._is_packed or x.dim() == 2:
            return [rows for rows, _ in self.slots]
        return self._by_length.get(x.shape[1]) or self._by_length[max(self._by_length)]

    def adapt(self, out: Tensor, x: Tensor, *, layer: str) -> Tensor:
        """Returns the output `out` (rows, ..., out) of a layer for the input `x`, with all slots applied."""
        places = self.places(x)
        groups = [
            (place, own)
            for place, (_, slot) in zip(places, self.slots, strict=True)
            if (own := slot.layers.get(layer)) is not None
        ]
        if self._is_packed and x.dim() == 3:
            adapt(out[0], x[0], groups=groups)
            return out
        return adapt(out, x, groups=groups)


def _places(slots: Sequence[tuple[slice, Slot]], lengths: Sequence[int]) -> list[slice]:
    starts = list(accumulate(lengths, initial=0))
    return [slice(starts[rows.start], starts[rows.stop]) for rows, _ in slots] if lengths else []


@contextmanager
def adapting(layers: Mapping[str, nn.Module], rows: RowSlots) -> Iterator[None]:
    """Within this context, the outputs of `layers` (by their names in adapter files) have the slots of `rows` applied.

    For one thread at a time, inference only. Layers compiled by `torch.compile` do not notice the context.
    """
    names = dict.fromkeys(name for _, slot in rows.slots for name in slot.layers)
    with ExitStack() as stack:
        for name in names:
            handle = layers[name].register_forward_hook(_hook(name, rows))
            stack.callback(handle.remove)
        yield


def _hook(name: str, rows: RowSlots) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:  # noqa: PLR0917 - torch's signature
        (x,) = args
        if isinstance(module, nn.Conv1d):
            return rows.adapt(out.mT.contiguous(), x.mT, layer=name).mT
        return rows.adapt(out, x, layer=name)

    return hook


class SlotBuffers:
    """The slots of one layer in tensors of fixed shape, so that a captured call reads slots that were written later.

    Slot 0 is plain. Slots of a lower rank than `rank` are filled up with zeros.
    """

    def __init__(self, weight: Tensor, *, slots: int, rank: int) -> None:
        """`weight` (out, in) is the layer's; the buffers are on its device. `slots` includes slot 0."""
        out, width = weight.shape
        self.scale = weight.new_ones(slots, out, dtype=torch.float32)
        self.offset = weight.new_zeros(slots, out, dtype=torch.float32)
        self.a = weight.new_zeros(slots, rank, width)
        self.b = weight.new_zeros(slots, rank, out)
        self.is_plain = weight.new_ones(slots, dtype=torch.bool)

    def write(self, index: int, slot: LayerSlot | None) -> None:
        """Replace slot `index`, which is not 0. None: a chain that does not change this layer."""
        if index <= 0:
            raise ValueError(f"slot {index} cannot be written: slot 0 is plain")
        self.is_plain[index] = slot is None
        self.a[index] = 0
        self.b[index] = 0
        if slot is not None:
            self.scale[index] = slot.scale
            self.offset[index] = slot.offset
            self.a[index, : len(slot.a)] = slot.a
            self.b[index, : len(slot.a)] = slot.b.T

    def adapt_rows(self, out: Tensor, x: Tensor, *, slots: Tensor) -> Tensor:
        """Returns `out` (rows, tokens, out) with each row's slot applied. `slots` (rows,) int64 are the rows' slots.

        Plain rows keep their bytes.
        """
        update = torch.bmm(torch.bmm(x, self.a[slots].mT), self.b[slots])
        return self._combine(out, update, slots=slots[:, None])

    def adapt_tokens(self, out: Tensor, x: Tensor, *, slots: Tensor) -> Tensor:
        """Returns `out` (tokens, out) with each token's slot applied. `slots` (tokens,) int64 are the tokens' slots.

        Multiplies every token with the factors of all slots and replaces the results of other slots by zeros. With few
        slots this is faster than to copy the factors for every token. Plain tokens keep their bytes.
        """
        inner = F.linear(x, self.a.flatten(0, 1)).unflatten(-1, self.a.shape[:2])
        is_other = slots[:, None] != torch.arange(len(self.a), device=slots.device)
        update = inner.masked_fill(is_other[..., None], 0.0).flatten(1) @ self.b.flatten(0, 1)
        return self._combine(out, update, slots=slots)

    def _combine(self, out: Tensor, update: Tensor, *, slots: Tensor) -> Tensor:
        adapted = (out * self.scale[slots] + self.offset[slots] + update).to(out.dtype)
        return torch.where(self.is_plain[slots][..., None], out, adapted)
