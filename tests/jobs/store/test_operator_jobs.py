"""What operators do with the job store, on every database."""

from __future__ import annotations

from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.outbox import Outbox
from tests.jobs.stores import (
    ERROR,
    Wall,
    add,
    claim,
    database,
    dead_letter,
    find,
    lease,
    postgres_with_tables,
    ref,
    result_of,
    store,
    store_url,
    wall,
)

__all__ = ["database", "postgres_with_tables", "store", "store_url", "wall"]


class TestOperators:
    """The command line sees everybody's jobs and may try dead letters again."""

    def test_see_all_jobs_newest_first(self, store: JobStore) -> None:
        jobs = [add(store, contract=contract, client=contract) for contract in ("sa3", "fal", "aiml")]
        assert store.operators.list_all() == jobs[::-1]
        assert store.operators.list_all(limit=2) == jobs[:0:-1]
        store.clients.cancel(jobs[1].spec.ref)
        assert [job.spec.id for job in store.operators.list_all(state="cancelled")] == [jobs[1].spec.id]
        assert store.operators.counts() == {"queued": 2, "cancelled": 1}

    def test_see_dead_letters(self, store: JobStore) -> None:
        add(store)
        store.runners.fail(lease(store), ERROR)
        dead = dead_letter(store)
        assert store.operators.list_all(dead_letters=True) == [dead]

    def test_let_a_dead_letter_start_over(self, store: JobStore, wall: Wall) -> None:
        dead = dead_letter(store, start_within_s=5.0, webhook_url="https://a.example/")
        wall.now += 100
        retried = store.operators.retry(dead.spec.ref)
        assert retried == find(store, dead)
        assert (retried.state, retried.attempts, retried.error, retried.completed_at) == ("queued", 0, None, None)
        assert not retried.is_dead_letter
        assert store.runners.expire() == []
        assert Outbox(store.database).claim(for_s=60) is None  # it is not over any more
        again = lease(store)
        assert (again.attempts, again.lease.fence if again.lease else 0) == (1, 2)
        assert store.runners.succeed(again, result_of(again)) is not None
        notice = claim(Outbox(store.database))
        assert (notice.job.state, notice.attempt) == ("succeeded", 1)

    def test_cannot_retry_anything_else(self, store: JobStore) -> None:
        waiting, failed = add(store), add(store)
        store.clients.cancel(waiting.spec.ref)
        store.runners.fail(lease(store), ERROR)
        before = (find(store, waiting), find(store, failed))
        assert [store.operators.retry(one) for one in (waiting.spec.ref, failed.spec.ref, ref("other"))] == [None] * 3
        assert (find(store, waiting), find(store, failed)) == before

    def test_a_retry_forgets_that_it_was_to_be_cancelled(self, store: JobStore) -> None:
        add(store)
        job = lease(store)
        store.clients.cancel(job.spec.ref)
        store.runners.fail(job, ERROR, is_dead_letter=True)
        store.operators.retry(job.spec.ref)
        assert lease(store).cancel_requested is False
