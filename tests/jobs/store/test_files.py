"""Published files (audio with a public link) in the job store, with every kind of database."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stable_audio_serve.core.errors import ConflictError
from stable_audio_serve.jobs.store.job_store import JobStore
from tests.jobs.stores import FILE, database, postgres_with_tables, store, wall
from tests.jobs.stores import contract_store_url as store_url

__all__ = ["database", "postgres_with_tables", "store", "store_url", "wall"]


class TestPublishedFiles:
    """A published file is found by its id alone, without a client or a job."""

    def test_ids_cannot_be_guessed(self, store: JobStore) -> None:
        ids = {store.files.publish(FILE) for _ in range(3)}
        assert len(ids) == 3
        assert all(len(file_id) == 32 for file_id in ids)
        assert [store.files.find(file_id) for file_id in ids] == [FILE] * 3
        assert store.files.find("other") is None

    def test_used_id_keeps_its_file(self, store: JobStore) -> None:
        store.files.publish(FILE, file_id="mine")
        with pytest.raises(ConflictError):
            store.files.publish(replace(FILE, key="other"), file_id="mine")
        assert store.files.find("mine") == FILE
