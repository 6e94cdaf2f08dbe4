"""How many calls of a side were captured on its device, how many ran without, and how many steps were made."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

from stable_audio_serve.core.metrics import NullMetrics

_SETTLED_S = 1.0  # an idle engine that captured nothing for so long has nothing left to capture


class Captures(NullMetrics):
    """The sink of one side's metrics. `changed_at` on the monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._captured: Counter[str] = Counter()  # by kind of call
        self.num_misses = 0
        self.num_steps = 0
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

    def observe(self, name: str, value: float, **labels: str) -> None:
        self.num_steps += name == "engine_rows_per_step"


async def wait_for_captures(captures: Captures) -> None:
    """Return once an idle engine has captured what it wants to."""
    while time.monotonic() < captures.changed_at + _SETTLED_S:  # noqa: ASYNC110 - another thread captures
        await asyncio.sleep(0.05)
