"""Work that a loop starts now and then without waiting for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from stable_audio_serve.core.clock import Clock

log = structlog.get_logger("stable_audio_serve.jobs")


class Periodic:
    """Runs `action` beside the caller, one at a time and at most every `every_s` seconds. Logs what it raises."""

    def __init__(self, action: Callable[[], Awaitable[None]], *, every_s: float, clock: Clock) -> None:
        self._action = action
        self._every_s = every_s
        self._clock = clock
        self._started_at = float("-inf")
        self._task: asyncio.Task[None] | None = None

    def start_if_due(self) -> None:
        """Begin, unless it is going on or was begun too short a time ago."""
        now = self._clock.monotonic()
        if now - self._started_at >= self._every_s and (self._task is None or self._task.done()):
            self._started_at = now
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Cancel what is going on."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            await self._action()
        except Exception:  # the next time may be better
            log.exception("background work failed")
