"""Cache the result of a slow query that clients poll, for example the numbers of jobs in the database."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from stable_audio_serve.core.clock import Clock, SystemClock

T = TypeVar("T")


class CachedQuery(Generic[T]):
    """The last result of an async query. At most one query runs at a time. Use it on one event loop only."""

    def __init__(
        self,
        query: Callable[[], Awaitable[T]],
        *,
        first: T,
        fresh_s: Callable[[T], float] | float = 1.0,
        usable_s: float = 0.0,
        kept_s: float = math.inf,
        timeout_s: float = 0.8,
        clock: Clock | None = None,
    ) -> None:
        """Make no query yet. `query` must not raise.

        `fresh_s` is how many seconds a result is used without a new query. It may depend on the result. When a query
        has run for `timeout_s` seconds, its callers get the last result. If that is newer than `usable_s` seconds, they
        get it without waiting. `first` is the result until there is another one, and if the last one is older than
        `kept_s` seconds.
        """
        self._query = query
        self._first = self._last = first
        self._fresh_s = fresh_s
        self._usable_s = usable_s
        self._kept_s = kept_s
        self._timeout_s = timeout_s
        self._clock = clock or SystemClock()
        self._began_at = self._ended_at = -math.inf
        self._running: asyncio.Task[None] | None = None

    async def answer(self) -> T:
        """Query again if the last result is old, and return `result`."""
        await self.refresh()
        return self.result

    async def refresh(self) -> bool:
        """Query again if the last result is old. Return False if the query has not ended."""
        if not self._is_running:
            fresh_s = self._fresh_s(self._last) if callable(self._fresh_s) else self._fresh_s
            if self._age_s >= fresh_s:
                self._began_at = self._clock.monotonic()
                self._running = asyncio.create_task(self._run())
        patience_s = self._timeout_s if self._age_s >= self._usable_s else 0.0
        return await self._wait(patience_s - self.running_s)

    async def wait(self) -> bool:
        """Wait at most `timeout_s` for a query in progress. Return False if it has not ended."""
        return await self._wait(self._timeout_s)

    @property
    def result(self) -> T:
        """The last result, or `first` if there is none or it is too old."""
        return self._last if self._age_s < self._kept_s else self._first

    @property
    def running_s(self) -> float:
        """How many seconds the query in progress has run. 0.0 if there is none."""
        return self._clock.monotonic() - self._began_at if self._is_running else 0.0

    def invalidate(self) -> None:
        """Drop the last result, so that the next call queries again. Cancels a query in progress."""
        self._ended_at = -math.inf
        if self._running is not None:
            self._running.cancel()
            self._running = None

    @property
    def _is_running(self) -> bool:
        return self._running is not None and not self._running.done()

    @property
    def _age_s(self) -> float:
        return self._clock.monotonic() - self._ended_at

    async def _wait(self, timeout_s: float) -> bool:
        if (running := self._running) is None or running.done():
            return True
        if timeout_s > 0:
            await asyncio.wait({running}, timeout=timeout_s)
        return running.done()

    async def _run(self) -> None:
        self._last = await self._query()
        self._ended_at = self._clock.monotonic()
