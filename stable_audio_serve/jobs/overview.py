"""Job counts for operators, cached so that frequent polling does not load the database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from stable_audio_serve.core.cached_query import CachedQuery
from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.jobs.job import State
from stable_audio_serve.jobs.store.operator_jobs import OperatorJobs, Unfinished

_COUNTS_FRESH_S = 15.0  # longer than for unfinished jobs, because the query for the other numbers reads every job


@dataclass(frozen=True, slots=True)
class JobsOverview:
    """Numbers of jobs; None = unknown.

    `unfinished` is `age_s` seconds old. `counts` has the number of jobs in each state, and may be older. If the
    last query failed or takes too long, `reason` says why.
    """

    unfinished: Unfinished | None = None
    counts: Mapping[State, int] | None = None
    counted_at: float | None = None
    reason: str | None = None

    @property
    def age_s(self) -> float | None:
        return None if self.counted_at is None else time.monotonic() - self.counted_at


class JobsWatch:
    """Caches the numbers of jobs, and queries the database again when the cached numbers are old.

    Use the object on one event loop only.
    """

    def __init__(self, jobs: OperatorJobs, *, fresh_s: float = 1.0) -> None:
        """Make no query. `fresh_s` is how many seconds the numbers of unfinished jobs are cached."""
        self._jobs = jobs
        self._all_counted_at = float("-inf")
        self._query = CachedQuery(self._count, first=JobsOverview(), fresh_s=fresh_s)

    async def overview(self) -> JobsOverview:
        """Return the numbers of jobs within a second. If the database is slow, return the cached numbers."""
        in_time = await self._query.refresh()
        found = self._query.result
        return found if in_time else replace(found, reason="the job database does not answer")

    async def close(self) -> None:
        """Wait less than a second for a query in progress."""
        await self._query.wait()

    async def _count(self) -> JobsOverview:
        known, now = self._query.result, time.monotonic()
        counts = known.counts
        try:
            unfinished = await asyncio.to_thread(self._jobs.unfinished)
            if now - self._all_counted_at >= _COUNTS_FRESH_S:
                counts = await asyncio.to_thread(self._jobs.counts)
                self._all_counted_at = now
        except StorageError as error:
            return replace(known, reason=error.message)
        return JobsOverview(unfinished, counts, now)
