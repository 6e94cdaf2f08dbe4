"""How many rows share a denoising step, as one engine's metrics tell it, for those who cannot read Prometheus."""

from __future__ import annotations

from stable_audio_serve.core.clock import Clock
from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.serving.recent import RecentSum

_ROWS = "engine_rows_per_step"
_WINDOW_S = 10


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
