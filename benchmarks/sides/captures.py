"""How many calls of a side were captured on its device, and how many ran without."""

from __future__ import annotations

import time
from collections import Counter

from stable_audio_serve.core.metrics import NullMetrics


class Captures(NullMetrics):
    """The sink of one side's metrics. `changed_at` on the monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._captured: Counter[str] = Counter()  # by kind of call
        self.num_misses = 0
        self.changed_at = float("-inf")

    @property
    def num_captured(self) -> int:
        """Of all kinds of calls."""
        return self._captured.total()

    def gauge(self, name: str, value: float, **labels: str) -> None:
        if name == "engine_graphs":
            self._captured[labels["kind"]], self.changed_at = int(value), time.monotonic()

    def increment(self, name: str, value: float = 1.0, **labels: str) -> None:
        if name == "engine_graph_misses":
            self.num_misses, self.changed_at = self.num_misses + int(value), time.monotonic()
