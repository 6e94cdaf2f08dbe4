"""Two queues of one device on a virtual clock. The second goes first whenever it has work; what it leaves of the
device's time is the first queue's: together they take as long as one after the other. Knows no engine.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(slots=True)
class _Call(Generic[Item]):
    number: int
    left_ms: float
    items: tuple[Item, ...]


@dataclass(slots=True)
class Queues(Generic[Item]):
    """The first queue's calls run when they are asked for; the second's begin at once, and the first waits for them."""

    now_ms: float = 0.0
    num_asked: int = 0  # calls of the second queue
    ended: list[tuple[Item, float]] = field(default_factory=list)  # by the second queue, and when
    _second: deque[_Call[Item]] = field(default_factory=deque)

    def run(self, ms: float, *, gap_ms: float = 0.0) -> None:
        """Run a call of the first queue to its end; for `gap_ms` of it, both queues have the device."""
        began_ms = self.now_ms
        self.wait(self.num_asked)
        self.now_ms += ms - min(gap_ms, self.now_ms - began_ms)

    def ask(self, ms: float, *items: Item) -> int:
        """Put a call into the second queue, at whose end `items` end. Returns its number."""
        self.num_asked += 1
        self._second.append(_Call(self.num_asked, ms, items))
        return self.num_asked

    def wait(self, number: int) -> None:
        """Let the first queue wait for the end of that call of the second."""
        while not self.has_ended(number):
            self.rest(self.now_ms + self._second[0].left_ms)

    def rest(self, until_ms: float) -> None:
        """Ask the first queue for nothing until then."""
        while self._second and self.now_ms + self._second[0].left_ms <= until_ms:
            call = self._second.popleft()
            self.now_ms += call.left_ms
            self.ended += [(item, self.now_ms) for item in call.items]
        if self._second and until_ms > self.now_ms:
            self._second[0].left_ms -= until_ms - self.now_ms
        self.now_ms = max(self.now_ms, until_ms)

    def has_ended(self, number: int) -> bool:
        """Whether that call of the second queue has ended."""
        return not self._second or self._second[0].number > number
