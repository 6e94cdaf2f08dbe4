"""When calls are captured beside traffic, so that nobody waits long: from how long that took. Knows no device."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Hashable

from stable_audio_serve.core.clock import Clock

MOST_MS = 200.0  # that a waiting step may be delayed
_SHARE = 0.1  # of the time while others wait
_MISSES_TO_DELAY = 100  # after which a shape is captured beside traffic however long that takes
_NUM_KEPT = 8  # captures of a kind to learn from: the first ones also initialise what a kernel needs


class CapturePace:
    """Used by the engine thread only."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._taken: defaultdict[Hashable, deque[tuple[int, float]]] = defaultdict(lambda: deque(maxlen=_NUM_KEPT))
        self._rests_until = -math.inf

    def saw(self, kind: Hashable, *, size: int, ms: float) -> None:
        """Note that a capture has ended, and how long it kept the device from everything else."""
        self._taken[kind].append((size, ms))
        self._rests_until = self._clock.monotonic() + ms / 1000.0 * (1.0 / _SHARE - 1.0)

    @property
    def is_resting(self) -> bool:
        """Whether captures have had their share of the time for now."""
        return self._clock.monotonic() < self._rests_until

    def allows(self, kind: Hashable, *, size: int, misses: int) -> bool:
        """Whether a shape may be captured while others wait."""
        return misses >= _MISSES_TO_DELAY or self._predicted_ms(kind, size) <= MOST_MS

    def _predicted_ms(self, kind: Hashable, size: int) -> float:
        """Returns no less than any larger capture took that is known, else in proportion to the largest."""
        taken = self._taken[kind]
        larger = [ms for known, ms in taken if known >= size]
        if larger:
            return min(larger)
        return max((ms * size / known for known, ms in taken), default=math.inf)
