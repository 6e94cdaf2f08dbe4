"""A sink of metrics that keeps their values."""

from __future__ import annotations

from collections import Counter
from typing import Any

from stable_audio_serve.core.metrics import NullMetrics


class RecordedMetrics(NullMetrics):
    """Keeps the values of each metric under its name, followed by the values of its labels.

    Examples: `gauges["key_file_broken"]`, `counters["jobs", "failed", "sa3"]`.
    """

    def __init__(self) -> None:
        self.counters: Counter[Any] = Counter()
        self.gauges: dict[Any, float] = {}
        self.samples: dict[Any, list[float]] = {}

    def increment(self, name: str, value: float = 1.0, **labels: str) -> None:
        super().increment(name, value, **labels)
        self.counters[_key(name, labels)] += value  # type: ignore[assignment]

    def gauge(self, name: str, value: float, **labels: str) -> None:
        super().gauge(name, value, **labels)
        self.gauges[_key(name, labels)] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        super().observe(name, value, **labels)
        self.samples.setdefault(_key(name, labels), []).append(value)


def _key(name: str, labels: dict[str, str]) -> Any:
    return (name, *labels.values()) if labels else name
