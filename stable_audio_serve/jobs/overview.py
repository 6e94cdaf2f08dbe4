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

# Longer than for unfinished jobs, because the query for the other numbers reads every job. In a large database it may
# take many seconds or be ended, and the numbers of unfinished jobs must not wait for it.
_COUNTS_FRESH_S = 15.0


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
        self._unfinished = CachedQuery(self._count_unfinished, first=JobsOverview(), fresh_s=fresh_s)
        self._all = CachedQuery(self._count_all, first=JobsOverview(), fresh_s=_COUNTS_FRESH_S)

    async def overview(self) -> JobsOverview:
        """Return the numbers of jobs within a second. If the database is slow, return the cached numbers."""
        in_time = await asyncio.gather(self._unfinished.refresh(), self._all.refresh())
        unfinished, counted = self._unfinished.result, self._all.result
        reason = unfinished.reason or counted.reason if all(in_time) else "the job database does not answer"
        return replace(unfinished, counts=counted.counts, reason=reason)

    async def close(self) -> None:
        """Wait less than a second for queries in progress."""
        await asyncio.gather(self._unfinished.wait(), self._all.wait())

    async def _count_unfinished(self) -> JobsOverview:
        try:
            return JobsOverview(await asyncio.to_thread(self._jobs.unfinished), counted_at=time.monotonic())
        except StorageError as error:
            return replace(self._unfinished.result, reason=error.message)

    async def _count_all(self) -> JobsOverview:
        try:
            return JobsOverview(counts=await asyncio.to_thread(self._jobs.counts))
        except StorageError as error:
            return replace(self._all.result, reason=error.message)
