"""Device memory for the values that rows keep between steps, in numbered pages. Calls address pages by number, so the
memory that a call reads stays at fixed addresses, whichever rows it has. Independent of rows and models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import torch
from torch import Tensor

PAGE_FRAMES = 64
ZERO_PAGE, SCRATCH_PAGE = 0, 1  # page 0 reads as zeros and is never written; page 1 takes discarded writes

Pages = tuple[int, ...]


def pages_of(frames: int) -> int:
    """Return the number of pages that hold this many frames."""
    return -(-frames // PAGE_FRAMES)


class FrameArena:
    """Pages of 64 frames with `channels` values each. Used by one thread.

    When the arena is full, it doubles and `memory` moves; `num_moves` counts the moves.
    """

    def __init__(
        self, channels: int, *, device: torch.device, dtype: torch.dtype = torch.float32, num_pages: int = 64
    ) -> None:
        self.memory = torch.empty(num_pages, channels, PAGE_FRAMES, device=device, dtype=dtype)
        self.memory[ZERO_PAGE] = 0.0
        self.num_moves = 0
        self._free = list(range(SCRATCH_PAGE + 1, num_pages))  # a heap: lowest numbers first, to touch few pages

    def take(self, frames: int) -> Pages:
        """Return pages for this many frames, uninitialised."""
        count = pages_of(frames)
        while len(self._free) < count:
            self._grow()
        return tuple(heappop(self._free) for _ in range(count))

    def free(self, pages: Pages) -> None:
        """Return pages to the arena."""
        for page in pages:
            heappush(self._free, page)

    def _grow(self) -> None:
        old = len(self.memory)
        self.memory = _doubled(self.memory)
        self.num_moves += 1
        for page in range(old, 2 * old):
            heappush(self._free, page)


class SlotArena:
    """Memory for tensors of one shape, in numbered slots; slot 0 is all zeros. Used by one thread.

    Grows like a FrameArena.
    """

    def __init__(self, like: Tensor, *, num_slots: int = 8) -> None:
        """`like` gives the shape, dtype and device of the values."""
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
        """Return a slot to the arena."""
        heappush(self._free, slot)


def _doubled(memory: Tensor) -> Tensor:
    """Return memory of twice the size that begins with the old contents. The rest is uninitialised."""
    larger = memory.new_empty(2 * len(memory), *memory.shape[1:])
    larger[: len(memory)] = memory
    return larger


def read(memory: Tensor, table: Tensor, *, frames: int) -> Tensor:
    """Return the first `frames` frames (..., D, frames) of the pages in `table` (..., P) int32."""
    found = memory.index_select(0, table.flatten()).view(*table.shape, *memory.shape[1:])
    joined = found.movedim(-3, -2).flatten(-2)
    return joined[..., :frames].contiguous()


def write(memory: Tensor, table: Tensor, *, values: Tensor) -> None:
    """Write values (..., D, F) to the pages of `table` (..., P) int32, padded with zeros to whole pages.

    Values for page `ZERO_PAGE` are discarded.
    """
    room = table.shape[-1] * PAGE_FRAMES
    padded = torch.nn.functional.pad(values, (0, room - values.shape[-1]))
    pages = padded.unflatten(-1, (-1, PAGE_FRAMES)).movedim(-2, -3).flatten(0, -3)
    memory.index_copy_(0, torch.where(table == ZERO_PAGE, SCRATCH_PAGE, table).flatten().long(), pages)


@dataclass(frozen=True, slots=True)
class HeldFrames:
    """The pages of one row in an arena: several parts (registers, blend inputs) of `frames` frames each."""

    arena: FrameArena
    frames: int
    parts: tuple[Pages, ...]

    @classmethod
    def take(cls, arena: FrameArena, *, frames: int, num_parts: int) -> HeldFrames:
        return cls(arena, frames, tuple(arena.take(frames) for _ in range(num_parts)))

    def free(self) -> None:
        """Return all pages to the arena; do not use the value afterwards."""
        for pages in self.parts:
            self.arena.free(pages)


def page_table(parts: Sequence[Sequence[Pages]], *, frames: int, num_parts: int) -> list[int]:
    """Return the page numbers of each row's parts for a call over `frames` frames, flattened.

    Each of the `num_parts` parts of a row has as many numbers as the call has pages, filled up with `ZERO_PAGE`.
    """
    width = pages_of(frames)
    table: list[int] = []
    for row in parts:
        for part in range(num_parts):
            pages = row[part] if part < len(row) else ()
            table += [*pages, *[ZERO_PAGE] * (width - len(pages))]
    return table
