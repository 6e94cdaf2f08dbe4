"""What the code measures about itself, independent of who collects it (`serving` exports to Ray's metrics)."""

from __future__ import annotations

from typing import Protocol


class Metrics(Protocol):
    """A sink for counters, gauges and distributions; names are snake_case and carry their unit."""

    def increment(self, name: str, value: float = 1.0, **tags: str) -> None:
        """Add `value` (>= 0) to the counter `name`."""
        ...

    def gauge(self, name: str, value: float, **tags: str) -> None:
        """Set the gauge `name`."""
        ...

    def observe(self, name: str, value: float, **tags: str) -> None:
        """Add one sample to the distribution `name`."""
        ...


class NullMetrics:
    """Drops everything; the default where nobody collects."""

    def increment(self, name: str, value: float = 1.0, **tags: str) -> None:
        """Do nothing."""

    def gauge(self, name: str, value: float, **tags: str) -> None:
        """Do nothing."""

    def observe(self, name: str, value: float, **tags: str) -> None:
        """Do nothing."""
