"""Background work that a loop starts now and then without waiting for it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import structlog

from stable_audio_serve.core.clock import Clock

log = structlog.get_logger("stable_audio_serve.jobs")


class Periodic:
    """Runs `action` beside its caller, one at a time, at least `pause_s` seconds apart. Logs what it raises."""

    def __init__(
        self,
        action: Callable[[], Awaitable[object]],
        *,
        pause_s: float,
        spread: float = 0.0,
        first_in_s: float = 0.0,
        clock: Clock,
    ) -> None:
        """Each pause differs from `pause_s` by up to this share, at random: processes that start together drift apart.

        The first run comes `first_in_s` after now, with the same spread.
        """
        self._action = action
        self._pause_s = pause_s
        self._spread = spread
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self._due_at = clock.monotonic() + self._vary(first_in_s)

    def start_if_due(self) -> None:
        """Start the action, unless it is still running or its pause is not over."""
        if self._task is None and self._clock.monotonic() >= self._due_at:
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Cancel the action if it is running."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            await self._action()
        except Exception:  # the next run may be better
            log.exception("background work failed")
        finally:
            self._due_at = self._clock.monotonic() + self._vary(self._pause_s)
            self._task = None

    def _vary(self, seconds: float) -> float:
        return seconds * random.uniform(1.0 - self._spread, 1.0 + self._spread)
