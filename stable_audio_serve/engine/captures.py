"""When calls are captured beside traffic, so that nobody waits long, and how much of the device's memory captured calls
may take, which they keep.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict, deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from stable_audio_serve.core.clock import Clock
from stable_audio_serve.engine.device import Device

log = logging.getLogger(__name__)

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


class CaptureRoom:
    """Counts by what this process holds more after a capture than before. Used by one thread."""

    def __init__(self, device: Device, *, max_bytes: int | None) -> None:
        """`max_bytes` None: no bound, and nothing is counted."""
        self._device = device
        self._max_bytes = max_bytes
        self.num_bytes = 0

    @property
    def is_full(self) -> bool:
        """Whether nothing more should be captured."""
        return self._max_bytes is not None and self.num_bytes >= self._max_bytes

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Returns a context for one capture, which may fail."""
        before = self._held()
        try:
            yield
        finally:
            self.num_bytes += max(0, self._held() - before)
            if self.is_full:
                held_gb = self.num_bytes / 1e9
                log.warning("captured calls hold %.3g GB: calls of other shapes run without (memory_share)", held_gb)

    def _held(self) -> int:
        memory = None if self._max_bytes is None else self._device.memory()
        return 0 if memory is None else memory.held
