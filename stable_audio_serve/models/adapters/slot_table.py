"""Stores slots (folded adapters) at fixed addresses, so that a CUDA graph can apply slots stored after its capture."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stable_audio_serve.models.adapters.fold import LayerSlot, Slot

PAGE_RANK = 8


@dataclass(frozen=True, slots=True)
class PlacedSlot:
    """Where a slot is stored in a `SlotTable`: the index of its scale and offset, and the pages of `a` and `b`."""

    index: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _LayerTable:
    """The tensors of a `SlotTable` for one layer.

    `scale` and `offset` (slots, out) are float32. `a` (pages * PAGE_RANK, in) and `b` (pages * PAGE_RANK, out) hold the
    pages one after another, in the weight's dtype. `is_plain` (slots,) bool is true if a slot does not change the
    layer.
    """

    scale: Tensor
    offset: Tensor
    a: Tensor
    b: Tensor
    is_plain: Tensor

    @classmethod
    def of(cls, weight: Tensor, *, num_slots: int, num_pages: int) -> _LayerTable:
        out, width = weight.shape
        return cls(
            weight.new_ones(num_slots, out, dtype=torch.float32),
            weight.new_zeros(num_slots, out, dtype=torch.float32),
            weight.new_zeros(num_pages * PAGE_RANK, width),
            weight.new_zeros(num_pages * PAGE_RANK, out),
            weight.new_ones(num_slots, dtype=torch.bool),
        )

    def write(self, placed: PlacedSlot, slot: LayerSlot | None) -> None:
        """Store a slot. `slot` is None if it does not change this layer."""
        self.is_plain[placed.index] = slot is None
        if slot is not None:
            self.scale[placed.index] = slot.scale
            self.offset[placed.index] = slot.offset
        for number, page in enumerate(placed.pages):
            into = slice(page * PAGE_RANK, (page + 1) * PAGE_RANK)
            own = slice(number * PAGE_RANK, (number + 1) * PAGE_RANK)
            for table, values in ((self.a, slot and slot.a[own]), (self.b, slot and slot.b[:, own].T)):
                table[into] = 0
                if values is not None:
                    table[into][: len(values)] = values


class SlotTable:
    """Slots in tensors at fixed addresses, so that a CUDA graph applies slots that are written after its capture.

    `a` and `b` of a slot are stored in pages of PAGE_RANK ranks. Index 0 is for rows without adapters. For one thread.
    """

    def __init__(self, layers: Mapping[str, nn.Linear | nn.Conv1d], *, num_slots: int, num_pages: int) -> None:
        """`num_slots` includes index 0."""
        self.num_pages = num_pages
        self.layers = {
            name: _LayerTable.of(layer.weight.flatten(1), num_slots=num_slots, num_pages=num_pages)
            for name, layer in layers.items()
        }
        # By id, the least recently used first. The references are weak, so that dropped slots free their memory.
        self._placed: OrderedDict[int, tuple[ref[Slot], PlacedSlot]] = OrderedDict()
        self._free_slots = set(range(1, num_slots))
        self._free_pages = set(range(num_pages))

    @staticmethod
    def page_bytes(layers: Mapping[str, nn.Linear | nn.Conv1d]) -> int:
        """Returns the memory of one page in all layers."""
        weights = [layer.weight.flatten(1) for layer in layers.values()]
        return sum(PAGE_RANK * sum(weight.shape) * weight.element_size() for weight in weights)

    def place(self, slots: Sequence[Slot]) -> list[PlacedSlot] | None:
        """Returns where each of `slots` is stored. Writes missing slots, over the least recently used ones if needed.

        Returns None if the table is too small for all of `slots`.
        """
        for key in [key for key, (known, _) in self._placed.items() if known() is None]:
            self._drop(key)
        needed = {id(slot): slot for slot in slots}
        num_pages = sum(-(-slot.rank // PAGE_RANK) for slot in needed.values())
        if num_pages > self.num_pages or len(needed) > len(self._free_slots) + len(self._placed):
            return None
        for key, slot in needed.items():
            if key in self._placed:
                self._placed.move_to_end(key)
            else:
                self._placed[key] = ref(slot), self._write(slot, kept=needed)
        return [self._placed[id(slot)][1] for slot in slots]

    def _drop(self, key: int) -> None:
        _, old = self._placed.pop(key)
        self._free_slots.add(old.index)
        self._free_pages.update(old.pages)

    def _write(self, slot: Slot, *, kept: Collection[int]) -> PlacedSlot:
        count = -(-slot.rank // PAGE_RANK)
        for key in [key for key in self._placed if key not in kept]:
            if self._free_slots and len(self._free_pages) >= count:
                break
            self._drop(key)
        placed = PlacedSlot(min(self._free_slots), tuple(sorted(self._free_pages)[:count]))
        self._free_slots.remove(placed.index)
        self._free_pages.difference_update(placed.pages)
        for name, layer in self.layers.items():
            layer.write(placed, slot.layers.get(name))
        return placed


class TableRows:
    """The slots of the rows of one captured call, as tensors that refer to a `SlotTable`."""

    def __init__(self, table: SlotTable, *, slots: Tensor, pages: Tensor, token_rows: Tensor | None) -> None:
        """`slots` (rows,) int32 has the index of each row's slot in `table`.

        `pages` (rows, pages) is nonzero where a row uses a page. It may have columns only for the table's first pages.
        `token_rows` (tokens,) is the row of each token of a packed call; None if the call is padded.
        """
        self._table = table
        self._rows = slots, pages != 0
        self._tokens = None if token_rows is None else tuple(each.index_select(0, token_rows) for each in self._rows)

    @property
    def names(self) -> Iterable[str]:
        """The names of the layers whose outputs `adapt` changes."""
        return self._table.layers

    def adapt(self, out: Tensor, x: Tensor, *, layer: str) -> Tensor:
        """Returns the output `out` (rows, ..., out) of a layer for the input `x`, with each row's slot applied.

        Rows without adapters are not changed. Every row is multiplied with all pages, and the results of pages that the
        row does not use are replaced by zeros. With few pages this is faster than copying the pages of each row.
        """
        own = self._table.layers[layer]
        if x.dim() == 3 and self._tokens is not None:
            slots, uses = (each[None] for each in self._tokens)
        else:
            slots, uses = (each[:, None] if x.dim() == 3 else each for each in self._rows)
        rank = uses.shape[-1] * PAGE_RANK
        inner = F.linear(x, own.a[:rank]).unflatten(-1, (-1, PAGE_RANK)).masked_fill(~uses[..., None], 0.0)
        update = inner.flatten(-2) @ own.b[:rank]
        adapted = (out * own.scale[slots] + own.offset[slots] + update).to(out.dtype)
        return torch.where(own.is_plain[slots][..., None], out, adapted)
