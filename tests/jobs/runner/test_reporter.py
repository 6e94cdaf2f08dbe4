from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection

import pytest
import sqlalchemy as sa

from stable_audio_serve.jobs.runner.heartbeat import LeaseId, lease_id
from stable_audio_serve.jobs.runner.reporter import Reporter
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.runner_jobs import Report
from tests.jobs.stores import RESULT, add, database, find, lease, postgres_with_tables, store, store_url, wall
from tests.patience import until

__all__ = ["database", "postgres_with_tables", "store", "store_url", "wall"]


@pytest.fixture
def lost() -> list[LeaseId]:
    return []


@pytest.fixture
async def reporter(store: JobStore, lost: list[LeaseId]) -> AsyncIterator[Reporter]:
    def tell(leases: Collection[LeaseId]) -> None:
        lost.extend(leases)

    reporter = Reporter(store, pause_s=0.2, on_lost=tell)
    yield reporter
    await reporter.close()


async def test_all_jobs_are_written_together_each_as_far_as_it_is(
    database: Database, store: JobStore, reporter: Reporter
) -> None:
    jobs = [lease(store) for job in [add(store) for _ in range(20)]]
    commits: list[object] = []
    sa.event.listen(database.engine, "commit", commits.append)
    for step in range(1, 11):
        for job in jobs:
            reporter.put(Report(job, "denoising", step / 10, eta_s=1.0))
    await until(lambda: find(store, jobs[0]).fraction == 1.0)
    assert {find(store, job).fraction for job in jobs} == {1.0}
    assert len(commits) == 1
    for job in jobs:
        assert [event.fraction for event in store.clients.events(job.spec.ref)] == [0.0, 0.0, 1.0]


async def test_a_lost_lease_is_told_and_the_others_are_written(
    store: JobStore, reporter: Reporter, lost: list[LeaseId]
) -> None:
    jobs = [lease(store) for job in [add(store) for _ in range(3)]]
    store.runners.requeue(jobs[1], delay_s=0.0, attempts=0, message="taken away")
    for job in jobs:
        reporter.put(Report(job, "denoising", 0.5))
    await until(lambda: bool(lost))
    assert lost == [lease_id(jobs[1])]
    assert [find(store, job).fraction for job in jobs] == [0.5, 0.0, 0.5]


async def test_what_was_dropped_is_not_written(store: JobStore, reporter: Reporter, lost: list[LeaseId]) -> None:
    ended, running = (lease(store) for job in [add(store), add(store)])
    reporter.put(Report(ended, "denoising", 0.5))
    reporter.put(Report(running, "denoising", 0.5))
    reporter.drop(lease_id(ended))
    store.runners.succeed(ended, RESULT)
    await until(lambda: find(store, running).fraction == 0.5)
    assert (find(store, ended).fraction, lost) == (1.0, [])


async def test_it_goes_on_when_the_store_was_away(database: Database, store: JobStore, reporter: Reporter) -> None:
    add(store)
    job = lease(store)
    failed: list[object] = []

    def fail(connection: sa.Connection) -> None:
        failed.append(connection)
        raise sa.exc.OperationalError("", {}, Exception("gone"))

    sa.event.listen(database.engine, "begin", fail)
    reporter.put(Report(job, "denoising", 0.1))
    await until(lambda: bool(failed))
    sa.event.remove(database.engine, "begin", fail)
    await asyncio.sleep(0)
    reporter.put(Report(job, "denoising", 0.2))
    await until(lambda: find(store, job).fraction == 0.2)
