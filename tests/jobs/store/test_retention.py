"""Deletion of old jobs and files from the job store, with every kind of database."""

from __future__ import annotations

from dataclasses import replace

from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.jobs.job import JobUpload
from stable_audio_serve.jobs.store.job_store import JobStore
from tests.jobs.stores import (
    FILE,
    Wall,
    add,
    database,
    dead_letter,
    find,
    lease,
    postgres_with_tables,
    result_of,
    store,
    wall,
)
from tests.jobs.stores import contract_store_url as store_url

__all__ = ["database", "postgres_with_tables", "store", "store_url", "wall"]


def upload(key: str) -> JobUpload:
    return JobUpload(StoredFile(key, "audio/wav", "a.wav", 12, "ab" * 32), "init", 47.5)


class TestRetention:
    """`purge` deletes old jobs in batches. It returns the keys of their files; its caller must delete the files."""

    def test_old_jobs_are_deleted_and_their_files_returned(self, store: JobStore, wall: Wall) -> None:
        old, waiting = add(store, upload=upload("uploads/old")), add(store, upload=upload("uploads/waiting"))
        ended = lease(store)
        store.runners.succeed(ended, result_of(ended))
        wall.now += 100
        young = lease(store)
        store.runners.succeed(young, result_of(young))
        later = add(store)
        wall.now += 50
        assert sorted(store.retention.purge(age_s=120)) == sorted(["uploads/old", result_of(ended).file.key])
        assert store.clients.get(old.spec.ref) is None
        assert store.clients.events(old.spec.ref) == ()
        assert store.files.find(result_of(ended).file_id) is None
        assert find(store, waiting).state == "succeeded"
        assert store.files.find(result_of(young).file_id) is not None
        assert find(store, later).state == "queued"
        assert store.retention.purge(age_s=120) == []

    def test_purged_id_can_be_used_again(self, store: JobStore, wall: Wall) -> None:
        job = add(store, id="1" * 32, idempotency_key="k", fingerprint="f")
        store.clients.cancel(job.spec.ref)
        wall.now += 10
        store.retention.purge(age_s=5)
        add(store, id="1" * 32, idempotency_key="k", fingerprint="other")

    def test_batches_are_bounded_and_oldest_first(self, store: JobStore, wall: Wall) -> None:
        jobs = []
        for number in range(5):
            jobs.append(add(store, upload=upload(f"uploads/{number}")))
            store.clients.cancel(jobs[-1].spec.ref)
            wall.now += 1
        wall.now += 100
        batches = [store.retention.purge(age_s=60, limit=2) for _ in range(4)]
        assert [sorted(batch) for batch in batches] == [
            ["uploads/0", "uploads/1"],
            ["uploads/2", "uploads/3"],
            ["uploads/4"],
            [],
        ]

    def test_jobs_without_files_do_not_end_the_purge(self, store: JobStore, wall: Wall) -> None:
        for _ in range(3):
            store.clients.cancel(add(store).spec.ref)
        store.clients.cancel(add(store, upload=upload("uploads/last")).spec.ref)
        wall.now += 100
        assert store.retention.purge(age_s=60, limit=1) == ["uploads/last"]
        assert (store.operators.counts(), store.retention.purge(age_s=60, limit=1)) == ({}, [])

    def test_published_files_are_deleted(self, store: JobStore, wall: Wall) -> None:
        file_id = store.files.publish(FILE)
        wall.now += 100
        young = store.files.publish(replace(FILE, key="young"))
        assert store.retention.purge(age_s=60) == [FILE.key]
        assert store.files.find(file_id) is None
        assert store.files.find(young) is not None

    def test_file_that_another_job_needs_stays(self, store: JobStore, wall: Wall) -> None:
        store.files.publish(FILE)
        wall.now += 100
        young = store.files.publish(FILE)
        assert store.retention.purge(age_s=60) == []
        assert store.files.find(young) == FILE

    def test_retried_dead_letter_stays(self, store: JobStore, wall: Wall) -> None:
        dead = dead_letter(store)
        wall.now += 100
        store.dead_letters.retry_job(dead.spec.ref)
        assert store.retention.purge(age_s=60) == []
        assert find(store, dead).state == "queued"

    def test_orphans_are_unreferenced_files(self, store: JobStore) -> None:
        add(store, upload=upload("uploads/ended"))
        job = lease(store)
        store.runners.succeed(job, result_of(job))
        dead_letter(store, upload=upload("uploads/dead"))
        add(store, upload=upload("uploads/running"))
        lease(store)
        add(store, upload=upload("uploads/waiting"))
        store.files.publish(FILE)
        needed = ["uploads/dead", "uploads/running", "uploads/waiting", result_of(job).file.key, FILE.key]
        assert store.retention.unreferenced(["x", *needed, "uploads/ended"]) == ["x", "uploads/ended"]
        assert store.retention.unreferenced([]) == []
        assert len(store.retention.unreferenced([f"many/{number}" for number in range(5_000)])) == 5_000
