"""Device memory for values that are stored between denoising steps. An arena is one tensor, in which pages or slots are
numbered. A device call gets the whole tensor and the numbers of the pages to use. One CUDA graph, which needs fixed
addresses, therefore works with any pages. On a device with CUDA graphs or limited memory, arenas have a fixed size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import torch
from torch import Tensor

PAGE_FRAMES = 64
_FIRST_PAGES, _FIRST_SLOTS = 62, 7  # of an arena that grows
ZERO_PAGE, SCRATCH_PAGE = 0, 1  # page 0 is all zeros and never written; values to be discarded are written to page 1

Pages = tuple[int, ...]


def pages_of(frames: int) -> int:
    """Return the number of pages that hold this many frames."""
    return -(-frames // PAGE_FRAMES)


class _Arena:
    """A tensor `memory` of numbered places: (places, *shape). Used by one thread.

    When too few places are free, `memory` is replaced by a copy of twice the size, unless the size is fixed.
    """

    def __init__(self, memory: Tensor, *, num_special: int, is_fixed: bool) -> None:
        """The first `num_special` places of `memory` are never taken. The first of them is set to 0."""
        self.memory = memory
        self.memory[ZERO_PAGE] = 0.0
        self._is_fixed = is_fixed
        self._free = list(range(num_special, len(memory)))  # a heap, so that the lowest free number is taken first

    def free(self, places: Sequence[int]) -> None:
        for place in places:
            heappush(self._free, place)

    def _take(self, count: int) -> tuple[int, ...]:
        while len(self._free) < count:
            old = self.memory
            if self._is_fixed:
                raise RuntimeError(f"all {len(old)} places of this memory are taken")
            self.memory = old.new_empty(2 * len(old), *old.shape[1:])
            self.memory[: len(old)] = old
            self.free(range(len(old), 2 * len(old)))
        return tuple(heappop(self._free) for _ in range(count))


class FrameArena(_Arena):
    """An arena of pages: (pages, channels, 64 frames)."""

    def __init__(
        self,
        channels: int,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        num_pages: int | None = None,
    ) -> None:
        """If `num_pages` is given, the size is fixed, and at most `num_pages` pages can be reserved at a time."""
        total = SCRATCH_PAGE + 1 + (_FIRST_PAGES if num_pages is None else num_pages)
        memory = torch.empty(total, channels, PAGE_FRAMES, device=device, dtype=dtype)
        super().__init__(memory, num_special=SCRATCH_PAGE + 1, is_fixed=num_pages is not None)

    def take(self, frames: int) -> Pages:
        """Reserve pages for this many frames and return their numbers. Their contents are uninitialised.

        Raises RuntimeError if the size is fixed and too few pages are free.
        """
        return self._take(pages_of(frames))


class SlotArena(_Arena):
    """An arena of slots for tensors of one shape: (slots, *shape)."""

    def __init__(self, like: Tensor, *, num_slots: int | None = None) -> None:
        """All values have the shape, dtype and device of `like`. If `num_slots` is given, the size is fixed."""
        total = ZERO_PAGE + 1 + (_FIRST_SLOTS if num_slots is None else num_slots)
        memory = like.new_empty(total, *like.shape)
        super().__init__(memory, num_special=ZERO_PAGE + 1, is_fixed=num_slots is not None)

    def put(self, value: Tensor) -> int:
        """Copy a value into a free slot and return the slot's number.

        Raises RuntimeError if the size is fixed and no slot is free.
        """
        (slot,) = self._take(1)
        self.memory[slot] = value
        return slot


def read(memory: Tensor, table: Tensor, *, frames: int) -> Tensor:
    """Read tensors that are stored in pages of `memory`. Returns (..., channels, frames).

    `table` (..., P) int32 has the numbers of the P pages of each tensor. The pages are concatenated along the frames
    and cut to `frames` frames.
    """
    found = memory.index_select(0, table.flatten()).view(*table.shape, *memory.shape[1:])
    joined = found.movedim(-3, -2).flatten(-2)
    return joined[..., :frames].contiguous()


def write(memory: Tensor, table: Tensor, *, values: Tensor) -> None:
    """Write the tensors `values` (..., channels, frames) to pages of `memory`. Zeros fill up the last page of a tensor.

    `table` (..., P) int32 has the numbers of the P pages of each tensor. Values for pages with the number `ZERO_PAGE`
    are discarded.
    """
    write_pages(memory, torch.where(table == ZERO_PAGE, SCRATCH_PAGE, table).long(), values=values)


def write_pages(memory: Tensor, table: Tensor, *, values: Tensor) -> None:
    """As `write`, for a `table` (..., P) int64 that does not contain `ZERO_PAGE`."""
    room = table.shape[-1] * PAGE_FRAMES
    padded = torch.nn.functional.pad(values, (0, room - values.shape[-1]))
    pages = padded.unflatten(-1, (-1, PAGE_FRAMES)).movedim(-2, -3).flatten(0, -3)
    memory.index_copy_(0, table.flatten(), pages)


@dataclass(frozen=True, slots=True)
class HeldFrames:
    """The pages of one clip's tensors. Each tensor has `frames` frames. `parts` has the pages of each tensor."""

    arena: FrameArena
    frames: int
    parts: tuple[Pages, ...]

    @classmethod
    def take(cls, arena: FrameArena, *, frames: int, num_parts: int) -> HeldFrames:
        width = pages_of(frames)
        pages = arena.take(num_parts * width * PAGE_FRAMES)  # at once: if the arena is full, nothing stays reserved
        return cls(arena, frames, tuple(pages[start : start + width] for start in range(0, len(pages), width)))

    def free(self) -> None:
        """Free all pages. The value must not be used afterwards."""
        for pages in self.parts:
            self.arena.free(pages)


def page_table(parts: Sequence[Sequence[Pages]], *, frames: int, num_parts: int) -> list[int]:
    """Return the page numbers of all rows as one list: by row, then by tensor (part) of the row, then by page.

    `parts[i][j]` has the pages of tensor j of row i. In the list, every row has `num_parts` tensors, and every tensor
    has the number of pages that `frames` frames need. `ZERO_PAGE` stands for missing pages and tensors.
    """
    width = pages_of(frames)
    table: list[int] = []
    for row in parts:
        for part in range(num_parts):
            pages = row[part] if part < len(row) else ()
            table += [*pages, *[ZERO_PAGE] * (width - len(pages))]
    return table
