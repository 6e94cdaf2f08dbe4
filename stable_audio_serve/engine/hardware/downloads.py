"""Copies tensors from a device to the host in the background: first to a fixed block of pinned memory, and from there
to ordinary memory.

The results have no pinned memory of their own, because the device would wait for each allocation, and the memory would
be in use until the response is sent. Torch also never frees pinned memory, and rounds its size up to a power of two.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

_PIECES = 4  # a tensor is copied in pieces of at most 1/4 of the ring, so that some arrive while others are collected
_ALIGNMENT = 64


class Point(Protocol):
    """A point in a device's queue; see `hardware.device.Moment`."""

    def is_reached(self) -> bool: ...

    def wait(self) -> None: ...


@dataclass(slots=True)
class _Download:
    start: int
    staged: Tensor
    target: Tensor
    arrived: Point
    is_done: bool = False


class DownloadRing:
    """A ring buffer of pinned memory through which tensors are copied to the host. Used by one thread."""

    def __init__(self, make: Callable[[int], Tensor], *, mark: Callable[[], Point], num_bytes: int) -> None:
        """`make(count)` allocates `count` bytes of pinned memory (uint8). It is called once, by the first `add`."""
        self._make = make
        self._mark = mark
        self._num_bytes = num_bytes
        self._memory: Tensor | None = None
        self._pending: deque[_Download] = deque()
        self._next = 0

    def add(self, source: Tensor, target: Tensor) -> None:
        """Start copying `source` to the contiguous host tensor `target`, which a later `collect` fills.

        Waits for earlier copies if the ring is full.
        """
        if self._memory is None:
            self._memory = self._make(self._num_bytes)
        longest = max(self._num_bytes // _PIECES // source.element_size(), 1)
        flat, into = source.contiguous().view(-1), target.view(-1)
        for begin in range(0, len(flat), longest):
            piece = flat[begin : begin + longest]
            start = self._place(piece.nbytes)
            staged = self._memory[start : start + piece.nbytes].view(piece.dtype)
            staged.copy_(piece, non_blocking=True)
            self._pending.append(_Download(start, staged, into[begin : begin + longest], self._mark()))
            self._next = start + -(-piece.nbytes // _ALIGNMENT) * _ALIGNMENT

    def collect(self) -> None:
        """Copy all data that has arrived in the ring to the host tensors."""
        for download in self._pending:
            if not download.is_done and download.arrived.is_reached():
                download.target.copy_(download.staged)
                download.is_done = True
        while self._pending and self._pending[0].is_done:
            self._pending.popleft()

    def _place(self, num_bytes: int) -> int:
        """Return the offset of `num_bytes` adjacent free bytes in the ring. Waits for earlier copies if necessary."""
        while True:
            if not self._pending:
                return 0
            taken = self._pending[0].start
            if self._next <= taken:  # the used part wraps around the end of the ring
                if num_bytes <= taken - self._next:
                    return self._next
            elif num_bytes <= self._num_bytes - self._next:
                return self._next
            elif num_bytes <= taken:
                return 0
            self._pending[0].arrived.wait()
            self.collect()
