from __future__ import annotations

from collections import Counter

from stable_audio_serve.core.metrics import NullMetrics


class CountingMetrics(NullMetrics):
    """Remembers what was counted."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def increment(self, name: str, value: float = 1.0, **tags: str) -> None:
        self.counts[name] += int(value)
