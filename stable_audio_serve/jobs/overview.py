"""Job counts for operators, cached so that frequent polling does not load the database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from stable_audio_serve.core.cached_query import CachedQuery
from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.jobs.job import State
from stable_audio_serve.jobs.store.operator_jobs import OperatorJobs, Unfinished

T = TypeVar("T")


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


@dataclass(frozen=True, slots=True)
class _Numbers(Generic[T]):
    """The last numbers that a query returned, and when. `reason` says why the query after it failed, if it did."""

    numbers: T | None = None
    at: float | None = None
    reason: str | None = None


class JobsWatch:
    """Caches the numbers of jobs, and queries the database again when the cached numbers are old.

    Use the object on one event loop only.
    """

    def __init__(self, jobs: OperatorJobs, *, fresh_s: float = 1.0, counts_fresh_s: float = 15.0) -> None:
        """The constructor makes no query.

        `fresh_s` is how many seconds the numbers of unfinished jobs are cached. `counts_fresh_s` is how many seconds
        the number of jobs in each state is cached: longer, because the query for this number reads every job.
        """
        self._unfinished = _cached(jobs.unfinished, fresh_s=fresh_s)
        self._counts = _cached(jobs.counts, fresh_s=counts_fresh_s)

    async def overview(self) -> JobsOverview:
        """Return the numbers of jobs within a second. If the database is slow, return the cached numbers."""
        in_time = await asyncio.gather(self._unfinished.refresh(), self._counts.refresh())
        unfinished, counts = self._unfinished.result, self._counts.result
        age_s = None if unfinished.at is None else time.monotonic() - unfinished.at
        reason = unfinished.reason or counts.reason if all(in_time) else "the job database does not answer"
        return JobsOverview(unfinished.numbers, counts.numbers, age_s, reason)

    async def close(self) -> None:
        """Wait less than a second for queries in progress."""
        await asyncio.gather(self._unfinished.wait(), self._counts.wait())


def _cached(query: Callable[[], T], *, fresh_s: float) -> CachedQuery[_Numbers[T]]:
    async def numbers() -> _Numbers[T]:
        try:
            return _Numbers(await asyncio.to_thread(query), time.monotonic())
        except StorageError as error:
            return replace(cached.result, reason=error.message)

    nothing: _Numbers[T] = _Numbers()
    cached = CachedQuery(numbers, first=nothing, fresh_s=fresh_s)
    return cached
