"""How many rows share a denoising step, as one engine's metrics tell it, for those who cannot read Prometheus."""

from __future__ import annotations

import threading
from collections import deque

from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.metrics import Metrics

_ROWS = "engine_rows_per_step"
_WINDOW_S = 10


class StepMeter:
    """Passes metrics on, and remembers the rows and steps of the last ten seconds. Safe from any thread."""

    def __init__(self, metrics: Metrics, *, clock: Clock | None = None) -> None:
        self._metrics = metrics
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._seconds: deque[list[float]] = deque(maxlen=_WINDOW_S)  # [second, steps, rows]

    def increment(self, name: str, value: float = 1.0, **labels: str) -> None:
        self._metrics.increment(name, value, **labels)

    def gauge(self, name: str, value: float, **labels: str) -> None:
        self._metrics.gauge(name, value, **labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._metrics.observe(name, value, **labels)
        if name != _ROWS:
            return
        second = float(int(self._clock.monotonic()))
        with self._lock:
            if not self._seconds or self._seconds[-1][0] != second:
                self._seconds.append([second, 0.0, 0.0])
            self._seconds[-1][1] += 1
            self._seconds[-1][2] += value

    @property
    def rows_per_step(self) -> float | None:
        """The mean of the last ten seconds, None without a step."""
        since = self._clock.monotonic() - _WINDOW_S
        with self._lock:
            steps = sum(steps for second, steps, _ in self._seconds if second >= since)
            rows = sum(rows for second, _, rows in self._seconds if second >= since)
        return rows / steps if steps else None
