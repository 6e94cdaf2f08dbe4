"""What the job store does for operators, with every kind of database."""

from __future__ import annotations

from stable_audio_serve.jobs.store.job_store import JobStore
from tests.jobs.stores import ERROR, add, database, dead_letter, lease, postgres_with_tables, store, wall
from tests.jobs.stores import contract_store_url as store_url

__all__ = ["database", "postgres_with_tables", "store", "store_url", "wall"]


class TestOperators:
    """Operators read and count the jobs of all clients."""

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
