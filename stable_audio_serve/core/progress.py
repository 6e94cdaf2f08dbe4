"""Progress on its way to somebody slower than the engine: across processes, into a database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

from stable_audio_serve.core.clock import Clock, SystemClock


class _Staged(Protocol):
    @property
    def stage(self) -> str: ...


Report = TypeVar("Report", bound=_Staged)


class ProgressFeed(Generic[Report]):
    """Hands out the latest report: a change of stage soon, and within a stage one per `interval_s` seconds.

    Belongs to one event loop.
    """

    def __init__(self, interval_s: float, *, least_interval_s: float = 0.0, clock: Clock = SystemClock()) -> None:
        """Between any two reports, and before the first, pass `least_interval_s`: shorter stages are left out."""
        self._interval_s = interval_s
        self._least_interval_s = least_interval_s
        self._clock = clock
        self._latest: Report | None = None  # until it is handed out
        self._changed = asyncio.Event()
        self._is_closed = False

    def put(self, report: Report) -> None:
        """Take in what is true now."""
        is_same_stage = self._latest is not None and self._latest.stage == report.stage
        self._latest = report
        if not is_same_stage:
            self._changed.set()

    def close(self) -> None:
        """Nothing comes any more: whoever iterates gets what is left and then the end."""
        self._is_closed = True
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[Report]:
        stage, told_at = "", self._clock.monotonic()
        while self._latest is not None or not self._is_closed:
            wait_s = self._wait_s(stage, told_at)
            if self._latest is not None and wait_s is not None and wait_s <= 0:
                report, self._latest = self._latest, None
                stage, told_at = report.stage, self._clock.monotonic()
                yield report
                continue
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()

    def _wait_s(self, stage: str, told_at: float) -> float | None:
        """Until the latest report may be handed out; None while there is none."""
        if self._latest is None:
            return None
        if self._is_closed:
            return 0.0
        interval_s = self._interval_s if self._latest.stage == stage else self._least_interval_s
        return told_at + interval_s - self._clock.monotonic()
