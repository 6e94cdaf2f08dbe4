from __future__ import annotations

from collections import Counter

from stable_audio_serve.core.metrics import NullMetrics


class CountingMetrics(NullMetrics):
    """Metrics that keep the sum of every counter and the last value of every gauge, for assertions."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.levels: dict[str, float] = {}

    def increment(self, name: str, value: float = 1.0, **tags: str) -> None:
        self.counts[name] += int(value)

    def gauge(self, name: str, value: float, **tags: str) -> None:
        self.levels[name] = value
