"""Device memory for values that are kept between denoising steps, divided into numbered pages. A device call gets the
whole memory and the numbers of the pages to use. One CUDA graph, which needs fixed addresses, therefore works with any
pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import torch
from torch import Tensor

PAGE_FRAMES = 64
ZERO_PAGE, SCRATCH_PAGE = 0, 1  # page 0 is all zeros and never written; values to be discarded are written to page 1

Pages = tuple[int, ...]


def pages_of(frames: int) -> int:
    """Return the number of pages that hold this many frames."""
    return -(-frames // PAGE_FRAMES)


class FrameArena:
    """A growing tensor `memory` of pages: (pages, channels, 64 frames). Used by one thread.

    When no page is free, `memory` is replaced by a copy of twice the size; `num_moves` counts the replacements.
    """

    def __init__(
        self, channels: int, *, device: torch.device, dtype: torch.dtype = torch.float32, num_pages: int = 64
    ) -> None:
        self.memory = torch.empty(num_pages, channels, PAGE_FRAMES, device=device, dtype=dtype)
        self.memory[ZERO_PAGE] = 0.0
        self.num_moves = 0
        self._free = list(range(SCRATCH_PAGE + 1, num_pages))  # a heap, so that the lowest free number is taken first

    def take(self, frames: int) -> Pages:
        """Reserve pages for this many frames and return their numbers. Their contents are uninitialised."""
        count = pages_of(frames)
        while len(self._free) < count:
            self._grow()
        return tuple(heappop(self._free) for _ in range(count))

    def free(self, pages: Pages) -> None:
        """Make these pages free for others."""
        for page in pages:
            heappush(self._free, page)

    def _grow(self) -> None:
        old = len(self.memory)
        self.memory = _doubled(self.memory)
        self.num_moves += 1
        for page in range(old, 2 * old):
            heappush(self._free, page)


class SlotArena:
    """A growing tensor `memory` with space for many tensors of one shape: (slots, *shape). Slot 0 is all zeros. Used by
    one thread.

    When no slot is free, `memory` is replaced by a copy of twice the size; `num_moves` counts the replacements.
    """

    def __init__(self, like: Tensor, *, num_slots: int = 8) -> None:
        """The values have the shape, dtype and device of `like`."""
        self.memory = like.new_empty(num_slots, *like.shape)
        self.memory[ZERO_PAGE] = torch.zeros_like(like)
        self.num_moves = 0
        self._free = list(range(ZERO_PAGE + 1, num_slots))

    def put(self, value: Tensor) -> int:
        """Copy a value into a free slot and return the slot's number."""
        if not self._free:
            old = len(self.memory)
            self.memory = _doubled(self.memory)
            self.num_moves += 1
            self._free = list(range(old, 2 * old))
        slot = heappop(self._free)
        self.memory[slot] = value
        return slot

    def free(self, slot: int) -> None:
        """Make this slot free for other values."""
        heappush(self._free, slot)


def _doubled(memory: Tensor) -> Tensor:
    """Return a tensor of twice the length, whose first half is a copy of `memory`. The rest is uninitialised."""
    larger = memory.new_empty(2 * len(memory), *memory.shape[1:])
    larger[: len(memory)] = memory
    return larger


def read(memory: Tensor, table: Tensor, *, frames: int) -> Tensor:
    """Concatenate pages of `memory` along the frames and cut them to `frames` frames. Returns (..., channels, frames).

    `table` (..., P) int32 has the numbers of the P pages of each result.
    """
    found = memory.index_select(0, table.flatten()).view(*table.shape, *memory.shape[1:])
    joined = found.movedim(-3, -2).flatten(-2)
    return joined[..., :frames].contiguous()


def write(memory: Tensor, table: Tensor, *, values: Tensor) -> None:
    """Write `values` (..., channels, frames) to pages of `memory`, padded with zeros to whole pages.

    `table` (..., P) int32 has the numbers of the P pages for each of the values. Where the number is `ZERO_PAGE`, the
    values are discarded.
    """
    room = table.shape[-1] * PAGE_FRAMES
    padded = torch.nn.functional.pad(values, (0, room - values.shape[-1]))
    pages = padded.unflatten(-1, (-1, PAGE_FRAMES)).movedim(-2, -3).flatten(0, -3)
    memory.index_copy_(0, torch.where(table == ZERO_PAGE, SCRATCH_PAGE, table).flatten().long(), pages)


@dataclass(frozen=True, slots=True)
class HeldFrames:
    """The pages of one clip. It has several tensors (`parts`) of `frames` frames each, and each has its own pages."""

    arena: FrameArena
    frames: int
    parts: tuple[Pages, ...]

    @classmethod
    def take(cls, arena: FrameArena, *, frames: int, num_parts: int) -> HeldFrames:
        return cls(arena, frames, tuple(arena.take(frames) for _ in range(num_parts)))

    def free(self) -> None:
        """Free all pages. The value must not be used afterwards."""
        for pages in self.parts:
            self.arena.free(pages)


def page_table(parts: Sequence[Sequence[Pages]], *, frames: int, num_parts: int) -> list[int]:
    """Return the page numbers of all rows as one list: by row, then by tensor (part) of the row, then by page.

    Every tensor gets as many numbers as `frames` frames need, and every row gets `num_parts` tensors. `ZERO_PAGE` fills
    up tensors with fewer pages and rows with fewer tensors.
    """
    width = pages_of(frames)
    table: list[int] = []
    for row in parts:
        for part in range(num_parts):
            pages = row[part] if part < len(row) else ()
            table += [*pages, *[ZERO_PAGE] * (width - len(pages))]
    return table
