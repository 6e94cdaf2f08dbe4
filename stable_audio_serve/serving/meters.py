"""What a replica counts of its last seconds, for operators who do not read Prometheus."""

from __future__ import annotations

import threading
from collections import deque

from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.metrics import Metrics

_ROWS = "engine_rows_per_step"
_WINDOW_S = 10


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


class StepMeter:
    """Passes metrics on, and remembers the rows and steps of the last ten seconds. Safe from any thread."""

    def __init__(self, metrics: Metrics, *, clock: Clock | None = None) -> None:
        self._metrics = metrics
        self._steps = RecentSum(_WINDOW_S, clock=clock)
        self._rows = RecentSum(_WINDOW_S, clock=clock)

    def increment(self, name: str, value: float = 1.0, **labels: str) -> None:
        self._metrics.increment(name, value, **labels)

    def gauge(self, name: str, value: float, **labels: str) -> None:
        self._metrics.gauge(name, value, **labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._metrics.observe(name, value, **labels)
        if name == _ROWS:
            self._steps.add()
            self._rows.add(value)

    @property
    def rows_per_step(self) -> float | None:
        """The mean of the last ten seconds, None without a step."""
        steps = self._steps.total
        return self._rows.total / steps if steps else None
