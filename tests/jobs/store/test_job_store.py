"""The name and the secret of a job database, on every database."""

from __future__ import annotations

from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.job_store import JobStore
from tests.jobs.stores import database, postgres_with_tables, store, store_url, wall

__all__ = ["database", "postgres_with_tables", "store", "store_url", "wall"]


def test_a_database_keeps_its_name(store: JobStore, database: Database) -> None:
    names = {store.identity(), store.identity(), JobStore(database).identity()}
    assert [len(name) for name in names] == [32]


def test_a_database_keeps_its_secret_which_is_not_its_name(store: JobStore, database: Database) -> None:
    secrets = {store.secret(), store.secret(), JobStore(database).secret()}
    assert [len(secret) for secret in secrets] == [64]
    assert store.identity() not in secrets.pop()
