"""How many jobs there are, for operators who look often: counted now and then, answered from memory in between."""

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

_PATIENCE_S = 0.8  # after this an old answer is better than a late one


@dataclass(frozen=True, slots=True)
class JobsOverview:
    """Jobs as they were `age_s` ago; None = not known. `counts` are of all states, and older.

    `reason` says why they are not known better.
    """

    unfinished: Unfinished | None = None
    counts: Mapping[State, int] | None = None
    age_s: float | None = None
    reason: str | None = None


class JobsWatch:
    """Counts when it is asked and its last count is old, once at a time. Belongs to one event loop."""

    def __init__(
        self,
        jobs: OperatorJobs,
        *,
        fresh_s: float = 1.0,
        counts_fresh_s: float = 15.0,
        clock: Clock | None = None,
    ) -> None:
        """Touches nothing yet. Counting those of all states reads them all, so it is done less often."""
        clock = clock or SystemClock()
        self._unfinished = _Question(jobs.unfinished, fresh_s=fresh_s, clock=clock)
        self._counts = _Question(jobs.counts, fresh_s=counts_fresh_s, clock=clock)

    async def overview(self) -> JobsOverview:
        """Returns what there is within a second, or else what was last known."""
        await asyncio.gather(self._unfinished.ask(), self._counts.ask())
        unfinished, counts = self._unfinished, self._counts
        return JobsOverview(unfinished.answer, counts.answer, unfinished.age_s, unfinished.reason or counts.reason)

    async def close(self) -> None:
        """Wait a moment for a count in progress."""
        await asyncio.gather(self._unfinished.wait(), self._counts.wait())


class _Question(Generic[T]):
    """A blocking question to the database, with its last answer."""

    def __init__(self, ask: Callable[[], T], *, fresh_s: float, clock: Clock) -> None:
        self._ask = ask
        self._fresh_s = fresh_s
        self._clock = clock
        self._asked_at = float("-inf")
        self._answered_at: float | None = None
        self._asking: asyncio.Task[None] | None = None
        self.answer: T | None = None
        self.reason: str | None = None

    @property
    def age_s(self) -> float | None:
        return None if self._answered_at is None else self._clock.monotonic() - self._answered_at

    async def ask(self) -> None:
        if self._asking is None and self._clock.monotonic() - self._asked_at >= self._fresh_s:
            self._asking = asyncio.create_task(self._find())
        if not await self.wait():
            self.reason = "the job database does not answer"

    async def wait(self) -> bool:
        """Whether no question is open within a moment."""
        if self._asking is None:
            return True
        done, _ = await asyncio.wait({self._asking}, timeout=_PATIENCE_S)
        return bool(done)

    async def _find(self) -> None:
        try:
            self.answer = await asyncio.to_thread(self._ask)
            self._answered_at, self.reason = self._clock.monotonic(), None
        except StorageError as error:
            self.reason = error.message
        finally:
            self._asked_at, self._asking = self._clock.monotonic(), None
