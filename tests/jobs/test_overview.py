"""Job counts are cached: there are few queries, and during a database outage the last counts stay available."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter

import pytest

from stable_audio_serve.core.cached_query import CachedQuery
from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.jobs.job import State
from stable_audio_serve.jobs.overview import JobsWatch
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.operator_jobs import OperatorJobs, Unfinished
from tests.jobs.stores import (
    ERROR,
    Wall,
    add,
    database,
    dead_letter,
    lease,
    postgres_with_tables,
    result_of,
    store,
    store_url,
    wall,
)
from tests.patience import PATIENCE_S

__all__ = ["database", "postgres_with_tables", "store", "store_url", "wall"]


class Slow(OperatorJobs):
    """A fake job store for operators. Its queries are counted, and wait until `released` and `counted` are set."""

    def __init__(self) -> None:
        self.queries: Counter[str] = Counter()
        self.released, self.counted = threading.Event(), threading.Event()
        self.released.set()
        self.counted.set()
        self.error: StorageError | None = None
        self.count_error: StorageError | None = None

    def unfinished(self) -> Unfinished:
        self.queries["unfinished"] += 1
        self.released.wait(PATIENCE_S)
        if self.error:
            raise self.error
        return Unfinished(1, 2, 3, 4.0)

    def counts(self) -> dict[State, int]:
        self.queries["counts"] += 1
        self.counted.wait(PATIENCE_S)
        if self.count_error:
            raise self.count_error
        return {"queued": 1}


async def test_counts_are_those_of_the_database(store: JobStore, wall: Wall) -> None:
    dead_letter(store)
    add(store)
    store.runners.succeed(job := lease(store), result_of(job))
    add(store)
    store.runners.fail(lease(store), ERROR)
    for _ in range(3):
        add(store)
    lease(store)
    wall.now += 7
    found = await JobsWatch(store.operators).overview()
    assert found.unfinished == Unfinished(num_queued=2, num_running=1, num_dead_letters=1, waited_s=7.0)
    assert found.counts == {"queued": 2, "running": 1, "failed": 2, "succeeded": 1}
    assert (found.reason, found.age_s is not None) == (None, True)


async def test_concurrent_callers_share_one_query(monkeypatch: pytest.MonkeyPatch) -> None:
    # However slow the machine is, no caller gets the old result.
    monkeypatch.setitem(CachedQuery.__init__.__kwdefaults__, "timeout_s", PATIENCE_S)
    jobs = Slow()
    watch = JobsWatch(jobs, fresh_s=60.0)
    found = await asyncio.gather(*(watch.overview() for _ in range(500)))
    assert {overview.unfinished for overview in found} == {Unfinished(1, 2, 3, 4.0)}
    await watch.overview()
    assert jobs.queries == {"unfinished": 1, "counts": 1}


@pytest.mark.server
async def test_silent_database_is_queried_once_and_old_counts_hold() -> None:
    jobs = Slow()
    watch = JobsWatch(jobs, fresh_s=0.0)
    await watch.overview()
    jobs.released.clear()
    for _ in range(2):
        found = await watch.overview()
        assert (found.unfinished, found.reason) == (Unfinished(1, 2, 3, 4.0), "the job database does not answer")
    assert jobs.queries["unfinished"] == 2
    jobs.released.set()
    await watch.close()
    assert (await watch.overview()).reason is None


async def test_broken_database_reports_the_reason() -> None:
    jobs = Slow()
    jobs.error = StorageError("the job database is away")
    found = await JobsWatch(jobs).overview()
    assert (found.unfinished, found.age_s, found.reason) == (None, None, "the job database is away")


@pytest.mark.server
async def test_unfinished_jobs_are_known_while_all_jobs_are_counted() -> None:
    jobs = Slow()
    jobs.counted.clear()
    watch = JobsWatch(jobs)
    found = await watch.overview()
    jobs.counted.set()
    assert (found.unfinished, found.counts) == (Unfinished(1, 2, 3, 4.0), None)
    assert found.reason == "the job database does not answer"
    await watch.close()
    assert (await watch.overview()).counts == {"queued": 1}


async def test_unfinished_jobs_are_known_if_counting_all_jobs_fails() -> None:
    jobs = Slow()
    jobs.count_error = StorageError("the query took too long")
    watch = JobsWatch(jobs, fresh_s=0.0)
    for _ in range(2):
        found = await watch.overview()
        assert (found.unfinished, found.counts) == (Unfinished(1, 2, 3, 4.0), None)
        assert found.reason == "the query took too long"
    assert jobs.queries == {"unfinished": 2, "counts": 1}  # the slow query is not repeated at once
