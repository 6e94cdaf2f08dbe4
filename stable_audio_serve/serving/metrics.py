"""`core.metrics.Metrics` over Ray's metrics, which every node exports for Prometheus as `ray_stable_audio_<name>`."""

from __future__ import annotations

import threading

from ray.util import metrics

_PREFIX = "stable_audio_"
_MS_BOUNDARIES = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 30_000, 60_000, 300_000]
_COUNT_BOUNDARIES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


class RayMetrics:
    """Makes each metric at its first use; `tags` are added to every sample. Safe from any thread.

    A metric's tag names are those of its first sample.
    """

    def __init__(self, **tags: str) -> None:
        self._tags = tags
        self._lock = threading.Lock()
        self._counters: dict[str, metrics.Counter] = {}
        self._gauges: dict[str, metrics.Gauge] = {}
        self._histograms: dict[str, metrics.Histogram] = {}

    def increment(self, name: str, value: float = 1.0, **tags: str) -> None:
        """Add `value` (>= 0) to the counter `name`."""
        if value <= 0:
            return  # Ray refuses to add nothing
        tags |= self._tags
        with self._lock:
            if name not in self._counters:
                self._counters[name] = metrics.Counter(_PREFIX + name, tag_keys=tuple(tags))
        self._counters[name].inc(value, tags=tags)

    def gauge(self, name: str, value: float, **tags: str) -> None:
        """Set the gauge `name`."""
        tags |= self._tags
        with self._lock:
            if name not in self._gauges:
                self._gauges[name] = metrics.Gauge(_PREFIX + name, tag_keys=tuple(tags))
        self._gauges[name].set(value, tags=tags)

    def observe(self, name: str, value: float, **tags: str) -> None:
        """Add one sample to the distribution `name`; names ending in `_ms` get time buckets, others counts."""
        tags |= self._tags
        with self._lock:
            if name not in self._histograms:
                boundaries = _MS_BOUNDARIES if name.endswith("_ms") else _COUNT_BOUNDARIES
                self._histograms[name] = metrics.Histogram(_PREFIX + name, boundaries=boundaries, tag_keys=tuple(tags))
        self._histograms[name].observe(value, tags=tags)
