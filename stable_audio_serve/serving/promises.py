"""The times at which refused clients were told to come again, of one model. Knows neither it nor other processes."""

from __future__ import annotations

import hashlib
import heapq
from collections import defaultdict

from stable_audio_serve.core.generation import GenerationRequest

MAX_PROMISES = 10_000

_GRACE_S = 5.0  # after its time a client is waited for: header fields carry whole seconds, and clients are not exact
# Of one refused client on what is known of how many come again. Who was expected and stays away leaves a place that
# others take; who comes unexpected finds none: so it is rather thought that they come.
_CAME_WEIGHT, _STAYED_AWAY_WEIGHT = 0.1, 0.03
_MAX_GONE = 1000  # entries of `_order` beyond those that are open, before they are cleared away


class Promises:
    """How many were told to come, and when. Clients are known by what they ask for; those with the same wish may take
    each other's places.
    """

    def __init__(self) -> None:
        self._dues: defaultdict[int, list[float]] = defaultdict(list)  # by wish; heaps
        self._order: list[tuple[float, int]] = []  # a heap of all of them, and of some that are closed
        self._return_share = 1.0
        self._num_open = 0

    @property
    def num_open(self) -> int:
        """How many were told to come and have not."""
        return self._num_open

    @property
    def return_share(self) -> float:
        """Which share of them comes, as lately."""
        return self._return_share

    def add(self, wish: int, *, due_at: float) -> bool:
        """Note that a client was told to come at `due_at`; above some thousands nobody is noted. Returns whether."""
        if self._num_open >= MAX_PROMISES:
            return False
        if len(self._order) > 2 * self._num_open + _MAX_GONE:
            self._order = sorted((due_at, wish) for wish, dues in self._dues.items() for due_at in dues)
        heapq.heappush(self._dues[wish], due_at)
        heapq.heappush(self._order, (due_at, wish))
        self._num_open += 1
        return True

    def claim(self, wish: int, *, now: float = float("inf")) -> bool:
        """Returns whether a client with this wish was told to come now or shortly before. It has come then."""
        if wish not in self._dues or self._dues[wish][0] > now:
            return False
        self._close(wish, has_come=True)
        return True

    def withdraw(self, wish: int) -> bool:
        """Forget one of the last that were told so with this wish. Returns whether there was one."""
        if wish not in self._dues:
            return False
        self._dues[wish].pop()  # the last of a heap may go: it has none below it
        self._note_closed(wish)
        return True

    def forget_late(self, now: float) -> None:
        """Stop waiting for those who did not come."""
        while self._order and self._order[0][0] < now - _GRACE_S:
            due_at, wish = heapq.heappop(self._order)
            if wish in self._dues and self._dues[wish][0] <= due_at:
                self._close(wish, has_come=False)

    def _close(self, wish: int, *, has_come: bool) -> None:
        heapq.heappop(self._dues[wish])
        self._note_closed(wish)
        weight = _CAME_WEIGHT if has_come else _STAYED_AWAY_WEIGHT
        self._return_share += weight * (has_come - self._return_share)

    def _note_closed(self, wish: int) -> None:
        if not self._dues[wish]:
            del self._dues[wish]
        self._num_open -= 1


def wish_of(request: GenerationRequest) -> int:
    """Returns a number that is the same in every process when a client asks for the same again, with any seed."""
    said = (
        request.prompt,
        request.negative_prompt,
        request.duration_s,
        request.steps,
        request.batch_size,
        request.init_audio is None,
        request.inpaint_regions_s,
    )
    return int.from_bytes(hashlib.blake2b(repr(said).encode("utf-8", "surrogatepass"), digest_size=8).digest())
