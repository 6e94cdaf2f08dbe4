"""A fixed block of pinned memory for everything copied back from a device: copies arrive there and are then moved to
ordinary memory. Independent of queues and device kinds.

Allocating pinned memory per result would happen while the device waits, and torch would keep it forever, rounded up to
powers of two. It would also stay in use until the response is sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

_PIECES = 4  # at least, per ring: one piece is moved while others still arrive
_ALIGNMENT = 64


class Point(Protocol):
    """A point in a device's queue; see `hardware.device.Moment`."""

    def is_reached(self) -> bool: ...

    def wait(self) -> None: ...


@dataclass(slots=True)
class _Landing:
    start: int
    staged: Tensor
    target: Tensor
    arrived: Point
    is_done: bool = False


class LandingRing:
    """A ring of pinned bytes. Used by one thread."""

    def __init__(self, make: Callable[[int], Tensor], *, mark: Callable[[], Point], num_bytes: int) -> None:
        """`make(count)` allocates pinned bytes (uint8); called when the first copy needs them."""
        self._make = make
        self._mark = mark
        self._num_bytes = num_bytes
        self._memory: Tensor | None = None
        self._landings: deque[_Landing] = deque()
        self._next = 0

    def land(self, source: Tensor, target: Tensor) -> None:
        """Queue a copy to contiguous host memory; `collect` moves the values there once they arrive.

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
            self._landings.append(_Landing(start, staged, into[begin : begin + longest], self._mark()))
            self._next = start + -(-piece.nbytes // _ALIGNMENT) * _ALIGNMENT

    def collect(self) -> None:
        """Move the values of finished copies to their targets."""
        for landing in self._landings:
            if not landing.is_done and landing.arrived.is_reached():
                landing.target.copy_(landing.staged)
                landing.is_done = True
        while self._landings and self._landings[0].is_done:
            self._landings.popleft()

    def _place(self, num_bytes: int) -> int:
        """Returns the start of this many free bytes, after waiting for them if necessary."""
        while True:
            if not self._landings:
                return 0
            taken = self._landings[0].start
            if self._next <= taken:  # the used part wraps around the end
                if num_bytes <= taken - self._next:
                    return self._next
            elif num_bytes <= self._num_bytes - self._next:
                return self._next
            elif num_bytes <= taken:
                return 0
            self._landings[0].arrived.wait()
            self.collect()
