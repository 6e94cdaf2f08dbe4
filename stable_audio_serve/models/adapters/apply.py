"""Applies adapters to the outputs of linear layers, in batches whose rows use different adapters.

A slot (`fold.Slot`) holds the adapters of one row or several. The layer itself runs once for all rows, without
adapters. A unit is a row of a padded batch or a token of a packed batch. In calls captured as a CUDA graph, the module
`slot_table` applies the slots.
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
from stable_audio_serve.models.adapters.slot_table import TableRows


def adapt(out: Tensor, x: Tensor, *, groups: Iterable[tuple[slice, LayerSlot]]) -> Tensor:
    """Apply a slot to each group of units in `out` (units, ..., out), the output of a linear layer, and return `out`.

    `x` (units, ..., in) is the layer's input. `out` must be contiguous and is overwritten. Units in no group are not
    changed, and the result of a group does not depend on other groups. Inference only. For a 1x1 convolution, the
    caller moves the channels to the last axis.
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
        """`slots` has pairs: a range of rows in the network's batch, and their slot. Other rows have no adapters.

        In a packed call, `frames` has the number of latent frames of each row. The network adds `num_prefix` tokens to
        each row.
        """
        self.slots = slots
        self._by_length = {
            sum(frames) + num_prefix * len(frames): _places(slots, [own + num_prefix for own in frames]),
            sum(frames): _places(slots, frames),
        }
        self._is_packed = bool(frames)

    @property
    def names(self) -> Iterable[str]:
        """The names of the layers whose outputs `adapt` changes."""
        return dict.fromkeys(name for _, slot in self.slots for name in slot.layers)

    def places(self, x: Tensor) -> Sequence[slice]:
        """Returns for each slot its range of units in `x`, the input of a linear layer."""
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
def adapting(layers: Mapping[str, nn.Module], rows: RowSlots | TableRows) -> Iterator[None]:
    """Within this context, apply the slots of `rows` to the outputs of `layers`.

    The keys of `layers` are the names in adapter files. For one thread at a time, inference only. Has no effect on
    layers compiled by `torch.compile`.
    """
    with ExitStack() as stack:
        for name in rows.names:
            handle = layers[name].register_forward_hook(_hook(name, rows))
            stack.callback(handle.remove)
        yield


def is_adapted(network: nn.Module) -> bool:
    """Whether `adapting`, or any other forward hook, applies to the network or to one of its layers."""
    return any(module._forward_hooks for module in network.modules())


def _hook(name: str, rows: RowSlots | TableRows) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:  # noqa: PLR0917 - torch's signature
        (x,) = args
        if isinstance(module, nn.Conv1d):
            return rows.adapt(out.mT.contiguous(), x.mT, layer=name).mT
        return rows.adapt(out, x, layer=name)

    return hook
