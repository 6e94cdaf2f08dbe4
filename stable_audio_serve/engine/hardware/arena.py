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


class FrameArena:
    """A tensor `memory` of pages: (pages, channels, 64 frames). Used by one thread.

    When no page is free, `memory` is replaced by a copy of twice the size, unless the size is fixed.
    """

    def __init__(
        self,
        channels: int,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        num_pages: int | None = None,
    ) -> None:
        """If `num_pages` is given, the size is fixed, and at most `num_pages` pages can be reserved at a time."""
        self._is_fixed = num_pages is not None
        total = SCRATCH_PAGE + 1 + (_FIRST_PAGES if num_pages is None else num_pages)
        self.memory = torch.empty(total, channels, PAGE_FRAMES, device=device, dtype=dtype)
        self.memory[ZERO_PAGE] = 0.0
        self._free = list(range(SCRATCH_PAGE + 1, total))  # a heap, so that the lowest free number is taken first

    def take(self, frames: int) -> Pages:
        """Reserve pages for this many frames and return their numbers. Their contents are uninitialised.

        Raises RuntimeError if the size is fixed and too few pages are free.
        """
        count = pages_of(frames)
        while len(self._free) < count:
            self._grow()
        return tuple(heappop(self._free) for _ in range(count))

    def free(self, pages: Pages) -> None:
        for page in pages:
            heappush(self._free, page)

    def _grow(self) -> None:
        old = len(self.memory)
        self.memory = _doubled(self.memory, is_fixed=self._is_fixed)
        for page in range(old, 2 * old):
            heappush(self._free, page)


class SlotArena:
    """A tensor `memory` with space for many tensors of one shape: (slots, *shape). Slot 0 is all zeros. Used by one
    thread.

    When no slot is free, `memory` is replaced by a copy of twice the size, unless the size is fixed.
    """

    def __init__(self, like: Tensor, *, num_slots: int | None = None) -> None:
        """All values have the shape, dtype and device of `like`. If `num_slots` is given, the size is fixed."""
        self._is_fixed = num_slots is not None
        total = ZERO_PAGE + 1 + (_FIRST_SLOTS if num_slots is None else num_slots)
        self.memory = like.new_empty(total, *like.shape)
        self.memory[ZERO_PAGE] = torch.zeros_like(like)
        self._free = list(range(ZERO_PAGE + 1, total))

    def put(self, value: Tensor) -> int:
        """Copy a value into a free slot and return the slot's number.

        Raises RuntimeError if the size is fixed and no slot is free.
        """
        if not self._free:
            old = len(self.memory)
            self.memory = _doubled(self.memory, is_fixed=self._is_fixed)
            self._free = list(range(old, 2 * old))
        slot = heappop(self._free)
        self.memory[slot] = value
        return slot

    def free(self, slot: int) -> None:
        heappush(self._free, slot)


def _doubled(memory: Tensor, *, is_fixed: bool) -> Tensor:
    """Return a tensor of twice the length, whose first half is a copy of `memory`. The rest is uninitialised.

    Raises RuntimeError if `is_fixed`.
    """
    if is_fixed:
        raise RuntimeError(f"all {len(memory)} places of this memory are taken")
    larger = memory.new_empty(2 * len(memory), *memory.shape[1:])
    larger[: len(memory)] = memory
    return larger


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
