"""A sum over the last seconds, one number for each second. Knows not what is added up."""

from __future__ import annotations

import threading
from collections import deque

from stable_audio_serve.core.clock import Clock, SystemClock


class RecentSum:
    """What was added in the last `window_s` whole seconds and the one that runs. Safe from any thread."""

    def __init__(self, window_s: int, *, clock: Clock | None = None) -> None:
        self._window_s = window_s
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._seconds: deque[tuple[int, float]] = deque(maxlen=window_s + 1)  # the second, what was added in it

    def add(self, value: float = 1.0) -> None:
        """Add to the second that runs."""
        with self._lock:
            second, before = int(self._clock.monotonic()), 0.0
            if self._seconds and self._seconds[-1][0] == second:
                before = self._seconds.pop()[1]
            self._seconds.append((second, before + value))

    @property
    def total(self) -> float:
        """The sum, 0 without any."""
        since = self._clock.monotonic() - self._window_s
        with self._lock:
            return sum(value for second, value in self._seconds if second >= since)
