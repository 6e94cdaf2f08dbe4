"""Job counts for operators, cached so that frequent polling does not load the database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.jobs.job import State
from stable_audio_serve.jobs.store.operator_jobs import OperatorJobs, Unfinished

T = TypeVar("T")

_TIMEOUT_S = 0.8  # how long a caller waits for the database before it gets the cached answer


@dataclass(frozen=True, slots=True)
class JobsOverview:
    """Numbers of jobs; None = unknown.

    `unfinished` is `age_s` seconds old. `counts` has the number of jobs in each state, and may be older. If the
    last query failed or takes too long, `reason` says why.
    """

    unfinished: Unfinished | None = None
    counts: Mapping[State, int] | None = None
    age_s: float | None = None
    reason: str | None = None


class JobsWatch:
    """Caches the numbers of jobs, and queries the database again when the cached numbers are old.

    At most one query of each kind runs at a time. Use the object on one event loop only.
    """

    def __init__(
        self,
        jobs: OperatorJobs,
        *,
        fresh_s: float = 1.0,
        counts_fresh_s: float = 15.0,
        clock: Clock | None = None,
    ) -> None:
        """The constructor makes no query.

        `fresh_s` is how many seconds the numbers of unfinished jobs are cached. `counts_fresh_s` is how many seconds
        the number of jobs in each state is cached: longer, because the query for this number reads every job.
        """
        clock = clock or SystemClock()
        self._unfinished = _CachedQuery(jobs.unfinished, fresh_s=fresh_s, clock=clock)
        self._counts = _CachedQuery(jobs.counts, fresh_s=counts_fresh_s, clock=clock)

    async def overview(self) -> JobsOverview:
        """Return the numbers of jobs within a second. If the database is slow, return the cached numbers."""
        await asyncio.gather(self._unfinished.refresh(), self._counts.refresh())
        unfinished, counts = self._unfinished, self._counts
        return JobsOverview(unfinished.answer, counts.answer, unfinished.age_s, unfinished.reason or counts.reason)

    async def close(self) -> None:
        """Wait at most `_TIMEOUT_S` for queries in progress."""
        await asyncio.gather(self._unfinished.wait(), self._counts.wait())


class _CachedQuery(Generic[T]):
    """A blocking database query, and its last answer."""

    def __init__(self, query: Callable[[], T], *, fresh_s: float, clock: Clock) -> None:
        self._query = query
        self._fresh_s = fresh_s
        self._clock = clock
        self._queried_at = float("-inf")
        self._answered_at: float | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self.answer: T | None = None
        self.reason: str | None = None

    @property
    def age_s(self) -> float | None:
        return None if self._answered_at is None else self._clock.monotonic() - self._answered_at

    async def refresh(self) -> None:
        if self._refreshing is None and self._clock.monotonic() - self._queried_at >= self._fresh_s:
            self._refreshing = asyncio.create_task(self._run())
        if not await self.wait():
            self.reason = "the job database does not answer"

    async def wait(self) -> bool:
        """Wait at most `_TIMEOUT_S` for a query in progress. Returns False if it is still in progress afterwards."""
        if self._refreshing is None:
            return True
        done, _ = await asyncio.wait({self._refreshing}, timeout=_TIMEOUT_S)
        return bool(done)

    async def _run(self) -> None:
        try:
            self.answer = await asyncio.to_thread(self._query)
            self._answered_at, self.reason = self._clock.monotonic(), None
        except StorageError as error:
            self.reason = error.message
        finally:
            self._queried_at, self._refreshing = self._clock.monotonic(), None
