"""Rows of the job database that another version of this package has written, with every kind of database."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from stable_audio_serve.jobs.job import Job
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.outbox import Outbox
from stable_audio_serve.jobs.store.tables import JOBS
from tests.jobs.stores import (
    LEASE_S,
    RESULT,
    Wall,
    add,
    claim,
    database,
    find,
    lease,
    leased_ids,
    postgres_with_tables,
    store,
    store_url,
    wall,
)

__all__ = ["database", "postgres_with_tables", "store", "store_url", "wall"]


class TestUnreadableJobs:
    """A job that this version cannot read, because another version wrote it, blocks no other job."""

    def spoil(self, store: JobStore, job: Job, **columns: str) -> None:
        with store.database.writing() as connection:
            connection.execute(sa.update(JOBS).where(JOBS.c.id == job.spec.id).values(columns))

    def test_unreadable_job_keeps_the_fields_of_its_columns(self, store: JobStore) -> None:
        job = add(store, client="me", priority="batch", id_is_chosen=True)
        self.spoil(store, job, spec='{"prompt": "rain"}')
        now = find(store, job)
        assert (now.is_readable, now.state, now.created_at) == (False, "queued", job.created_at)
        assert (now.spec.id, now.spec.model, now.spec.client) == (job.spec.id, job.spec.model, "me")
        assert (now.spec.request.priority, now.spec.id_is_chosen) == ("batch", True)

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"id": 7}'])
    def test_other_jobs_continue(self, store: JobStore, wall: Wall, text: str) -> None:
        bad, good = (add(store, client="me", webhook_url="https://a.example/") for _ in range(2))
        self.spoil(store, bad, spec=text, error=text)
        assert [job.spec.id for job in store.clients.list_own("sa3", "me").jobs] == [good.spec.id, bad.spec.id]
        assert len(store.operators.list_all()) == 2
        assert leased_ids(store, 2) == [bad.spec.id, good.spec.id]
        wall.now += LEASE_S
        assert [job.state for job in store.runners.reclaim(max_attempts=1)] == ["failed", "failed"]
        assert [claim(Outbox(store.database)).job.is_readable for _ in range(2)] == [False, True]
        assert store.dead_letters.retry_job(bad.spec.ref) is not None
        assert store.clients.cancel(bad.spec.ref)[0] == "removed"

    def test_unreadable_result_is_none(self, store: JobStore) -> None:
        add(store)
        job = lease(store)
        assert store.runners.succeed(job, RESULT) is not None
        self.spoil(store, job, result='{"file": 7}')
        assert (find(store, job).state, find(store, job).result) == ("succeeded", None)
