"""Implements `core.metrics.Metrics` with Ray's metrics, which Prometheus reads as `ray_stable_audio_<name>`.

Also contains `RecentSum` and `StepMeter`, with which a replica computes the statistics that `/v1/status` shows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from ray.util import metrics

from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.metrics import Kind, Metric, Metrics, declared

logger = logging.getLogger(__name__)

PREFIX = "stable_audio_"
_ROWS = "engine_rows_per_step"
_WINDOW_S = 10
_EXPORT_INTERVAL_S = 1.0
_MS_BOUNDARIES = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 30_000, 60_000, 300_000]
_COUNT_BOUNDARIES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]


class RayMetrics:
    """Exports metrics with Ray. Thread-safe.

    Values are stored, and a thread passes them to Ray once per second. On a CPU, calls of Ray after each denoising step
    took 3 % of the engine's time. Ray drops a gauge that is not set for 20 s, so the thread sets all gauges each time.

    Each of the constructor's `labels` is added to all metrics that declare a label of this name. All methods raise
    ValueError if the metric is not declared in `core.metrics`, or if a label is missing.
    """

    def __init__(self, **labels: str) -> None:
        self._labels = labels
        self._lock = threading.Lock()
        self._made: dict[str, Callable[..., None]] = {}  # the functions that pass a metric's values to Ray
        self._series: dict[tuple[object, ...], _Series] = {}
        self._samples: deque[tuple[_Series, float]] = deque()  # of counters and histograms, not yet passed to Ray
        self._levels: dict[_Series, float] = {}

    def increment(self, name: str, value: float = 1.0, **labels: str) -> None:
        series = self._find(name, "counter", labels=labels)
        if value > 0:  # Ray raises an error for an increment of 0
            self._samples.append((series, value))

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set the gauge `name` to `value`. It keeps the value until it is set again."""
        self._levels[self._find(name, "gauge", labels=labels)] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._samples.append((self._find(name, "histogram", labels=labels), value))

    def _export(self) -> None:
        while True:
            time.sleep(_EXPORT_INTERVAL_S)
            samples = [self._samples.popleft() for _ in range(len(self._samples))]
            for series, value in (*samples, *list(self._levels.items())):
                try:
                    series.record(value)
                except Exception:
                    logger.exception("a value of the metric %s is lost", series.name)

    def _find(self, name: str, kind: Kind, *, labels: dict[str, str]) -> _Series:
        key = (name, kind, *labels.items())
        if key not in self._series:  # another thread may be adding the same series
            self._series.setdefault(key, self._make_series(name, kind, labels=labels))
        return self._series[key]

    def _make_series(self, name: str, kind: Kind, *, labels: dict[str, str]) -> _Series:
        """Return a metric with these labels. The first metric also starts the thread that exports all values."""
        declaration = declared(name, kind, labels=labels)
        complete = {**{key: value for key, value in self._labels.items() if key in declaration.labels}, **labels}
        if missing := set(declaration.labels) - set(complete):
            raise ValueError(f"the metric {name} needs the label {', '.join(sorted(missing))}")
        with self._lock:
            if not self._made:
                threading.Thread(target=self._export, daemon=True, name="metrics").start()
            if name not in self._made:
                self._made[name] = _make(declaration)
            return _Series(name, partial(self._made[name], tags=complete))


class _Series(NamedTuple):
    """A metric with values for all of its labels. `record` adds to a counter or histogram, or sets a gauge."""

    name: str
    record: Callable[[float], None]


def _make(metric: Metric) -> Callable[..., None]:
    """Return the function that passes a value of this metric to Ray."""
    name, labels = PREFIX + metric.name, metric.labels
    if metric.kind == "counter":
        return metrics.Counter(name, metric.description, tag_keys=labels).inc
    if metric.kind == "gauge":
        return metrics.Gauge(name, metric.description, tag_keys=labels).set
    boundaries = _MS_BOUNDARIES if name.endswith("_ms") else _COUNT_BOUNDARIES
    return metrics.Histogram(name, metric.description, boundaries=boundaries, tag_keys=labels).observe


class RecentSum:
    """The sum of the values that were added in the current second and in the `window_s` seconds before. Thread-safe."""

    def __init__(self, window_s: int, *, clock: Clock | None = None) -> None:
        self._window_s = window_s
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._seconds: deque[tuple[int, float]] = deque(maxlen=window_s + 1)  # (second, sum of the values in it)

    def add(self, value: float = 1.0) -> None:
        """Add `value` to the sum of the current second."""
        with self._lock:
            second, before = int(self._clock.monotonic()), 0.0
            if self._seconds and self._seconds[-1][0] == second:
                before = self._seconds.pop()[1]
            self._seconds.append((second, before + value))

    @property
    def total(self) -> float:
        """The sum of the values. It is 0 if none was added in the window."""
        since = self._clock.monotonic() - self._window_s
        with self._lock:
            return sum(value for second, value in self._seconds if second >= since)


class StepMeter:
    """An engine's metrics sink. It forwards values, and counts denoising steps and their rows of the last ten seconds.

    A row is one variation that a denoising step computes. Before `open`, only gauges are forwarded, because warm-up
    runs would count as requests. Thread-safe.
    """

    def __init__(self, metrics: Metrics, *, clock: Clock | None = None) -> None:
        self._metrics = metrics
        self._is_open = False
        self._steps = RecentSum(_WINDOW_S, clock=clock)
        self._rows = RecentSum(_WINDOW_S, clock=clock)

    def open(self) -> None:
        """Forward and count all values from now on."""
        self._is_open = True

    def increment(self, name: str, value: float = 1.0, **labels: str) -> None:
        if self._is_open:
            self._metrics.increment(name, value, **labels)

    def gauge(self, name: str, value: float, **labels: str) -> None:
        self._metrics.gauge(name, value, **labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        if not self._is_open:
            return
        self._metrics.observe(name, value, **labels)
        if name == _ROWS:
            self._steps.add()
            self._rows.add(value)

    @property
    def rows_per_step(self) -> float | None:
        """The mean number of rows in a denoising step over the last ten seconds, None if there was no step."""
        steps = self._steps.total
        return self._rows.total / steps if steps else None
