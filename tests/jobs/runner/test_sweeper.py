"""Which old jobs and files the sweeper deletes, and which it keeps, in a local folder and in an S3 bucket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from stable_audio_serve.artifacts.keys import artifact_key, new_key
from stable_audio_serve.artifacts.local import LocalArtifacts
from stable_audio_serve.artifacts.s3 import S3Artifacts
from stable_audio_serve.artifacts.store import ArtifactStore, StoredFile
from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs.job import Job, JobError, JobResult, JobUpload
from stable_audio_serve.jobs.queue import JobQueue
from stable_audio_serve.jobs.runner.sweeper import Sweeper
from stable_audio_serve.jobs.store.database import Database, database_url
from stable_audio_serve.jobs.store.job_store import JobStore
from tests.jobs.conftest import Workshop, make_spec
from tests.object_storage import Faults, ObjectStorage
from tests.patience import until

HOUR = 3600.0
LIMITS = JobSettings(retention_s=7 * 24 * HOUR, orphan_after_s=24 * HOUR)


def swept(**numbers: int) -> dict[str, int]:
    return {"old": 0, "orphans": 0, "unfinished": 0} | numbers


@dataclass
class Place:
    """A job queue with its artifact store. A `Place` is also the sweeper's clock, which is `late_s` seconds ahead."""

    queue: JobQueue
    late_s: float = 0.0

    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time() + self.late_s

    def names(self) -> list[str]:
        raise NotImplementedError

    def write(self, key: str) -> None:
        """Write a file without the artifact store, as another program would."""
        raise NotImplementedError

    def begin(self, key: str) -> None:
        """Begin to write a file, and leave it incomplete."""
        raise NotImplementedError

    async def sweep(self, **limits: float) -> dict[str, int]:
        settings = LIMITS.model_copy(update=limits)
        store, artifacts = self.queue.store, self.queue.artifacts
        return await Sweeper(store, artifacts, settings=settings, clock=self).sweep()

    async def put(self, key: str) -> StoredFile:
        return await self.queue.artifacts.put(key, lambda: [b"audio"], media_type="audio/wav", file_name="a.wav")

    async def make_job(self, **overrides: Any) -> Job:
        """Submit a job with an upload, and start it. Returns the job."""
        file = await self.queue.put_upload(lambda: [b"upload"], media_type="audio/wav", file_name="a.wav")
        await self.queue.submit(make_spec(upload=JobUpload(file, "init", 10.0), **overrides))
        job = self.queue.store.runners.lease("me", lease_s=15)
        assert job is not None
        return job

    async def finish(self, job: Job) -> StoredFile:
        file = await self.put(artifact_key(job.spec.id, "a.wav", fence=1))
        assert self.queue.store.runners.succeed(job, JobResult(file, file.key[:32], 44100, (7,), 0.1)) is not None
        return file


@dataclass(kw_only=True)
class Folder(Place):
    folder: Path

    def names(self) -> list[str]:
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self.folder)) for path in paths if path.name != ".owner")

    def write(self, key: str) -> None:
        (self.folder / key).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / key).write_bytes(b"foreign")

    def begin(self, key: str) -> None:
        folder, _, name = key.rpartition("/")
        self.write(f"{folder}/.{name}.{'0' * 16}.partial")


@dataclass(kw_only=True)
class Bucket(Place):
    storage: ObjectStorage
    bucket: str

    def names(self) -> list[str]:
        names = (*self.storage.keys(self.bucket), *self.storage.unfinished(self.bucket))
        return sorted(name.removeprefix("p/") for name in names if not name.endswith(".owner"))

    def write(self, key: str) -> None:
        self.storage.client.put_object(Bucket=self.bucket, Key=f"p/{key}", Body=b"foreign")

    def begin(self, key: str) -> None:
        self.storage.client.create_multipart_upload(Bucket=self.bucket, Key=f"p/{key}")


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.server)])
async def unclaimed(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    """Yield a `Place` whose artifact store no database has claimed yet."""
    made = make_folder(tmp_path) if request.param == "local" else make_bucket(request, tmp_path)
    yield made
    await made.queue.close()


@pytest.fixture
def place(unclaimed: Place) -> Place:
    unclaimed.queue.artifacts.claim(unclaimed.queue.store.identity())
    return unclaimed


@pytest.fixture
async def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bucket]:
    made = make_bucket(request, tmp_path)
    made.queue.artifacts.claim(made.queue.store.identity())
    yield made
    await made.queue.close()


def make_folder(tmp_path: Path) -> Folder:
    folder = tmp_path / "files"
    made = Folder(make_queue(tmp_path, LocalArtifacts(folder), lambda: made.time()), folder=folder)
    return made


def make_bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Bucket:
    storage: ObjectStorage = request.getfixturevalue("object_storage")
    bucket = storage.make_bucket()
    artifacts = S3Artifacts(storage.settings(bucket, prefix="p"))
    made = Bucket(make_queue(tmp_path, artifacts, lambda: made.time()), storage=storage, bucket=bucket)
    return made


def make_queue(folder: Path, artifacts: ArtifactStore, now: Any, *, name: str = "jobs.db") -> JobQueue:
    url = database_url(f"sqlite:///{folder / name}", folder)
    return JobQueue(JobStore(Database(url, now=now), LIMITS), artifacts)


async def test_recent_files_stay(place: Place) -> None:
    await place.finish(await place.make_job())
    await place.make_job()
    await place.queue.publish(lambda: [b"x"], media_type="audio/wav", file_name="a.wav")
    await place.put(new_key("files"))
    before = place.names()
    assert len(before) == 5
    for late_s in (0, 23 * HOUR):
        place.late_s = late_s
        assert await place.sweep() == swept()
    assert place.names() == before


async def test_old_jobs_and_publications_are_deleted_with_their_files(place: Place) -> None:
    job = await place.make_job()
    await place.finish(job)
    file_id, _ = await place.queue.publish(lambda: [b"x"], media_type="audio/wav", file_name="a.wav")
    place.late_s = 6 * 24 * HOUR
    await place.queue.artifacts.delete(job.spec.upload.file.key if job.spec.upload else "")
    later = await place.finish(await place.make_job())
    place.late_s = 7 * 24 * HOUR + 1
    found = await place.sweep(orphan_after_s=30 * 24 * HOUR)
    assert found["old"] == 3  # the upload counts, although its file was deleted before
    assert await place.queue.get(job.spec.ref) is None
    assert await place.queue.find_file(file_id) is None
    assert later.key in place.names()
    assert not any(job.spec.id in name or name.startswith("files/") for name in place.names())


async def test_orphans_are_deleted_after_a_day(place: Place) -> None:
    job = await place.make_job()
    await place.finish(job)
    orphans = [artifact_key(job.spec.id, "a.wav", fence=2), new_key("uploads"), new_key("files")]
    for key in orphans:
        await place.put(key)
    place.late_s = 25 * HOUR
    assert await place.sweep() == swept(orphans=4)  # the three files, and the upload of the ended job
    assert place.names() == [artifact_key(job.spec.id, "a.wav", fence=1)]
    assert await place.sweep() == swept()


async def test_files_that_a_job_needs_stay(place: Place) -> None:
    running, dead, waiting = await place.make_job(), await place.make_job(), await place.make_job()
    error = JobError("unavailable", "no")
    assert place.queue.store.runners.fail(dead, error, is_dead_letter=True) is not None
    assert place.queue.store.runners.requeue(waiting, delay_s=0, attempts=0, message="again") is not None
    place.late_s = 30 * 24 * HOUR
    assert await place.sweep(retention_s=60 * 24 * HOUR) == swept()
    assert place.names() == sorted(job.spec.upload.file.key for job in (running, dead, waiting) if job.spec.upload)


FOREIGN = ("song.wav", "jobs.db", "uploads/photo.jpg", "files/x/y.wav", "other/" + "1" * 32 + "-a.wav", "1" * 32)


async def test_files_of_other_programs_stay(place: Place) -> None:
    for key in FOREIGN:
        place.write(key)
    place.late_s = 400 * 24 * HOUR
    assert await place.sweep() == swept()
    assert place.names() == sorted(FOREIGN)


async def test_files_older_than_the_claim_stay(unclaimed: Place) -> None:
    """Files that are older than the claim of an artifact store by its database belong to another program.

    The original Stable Audio 3 server uses the same file names and, by default, the same folder.
    """
    unclaimed.write(artifact_key("1" * 32, "stable-audio-3-medium.wav", fence=1))
    before = unclaimed.names()
    written_at = int(time.time())
    await until(lambda: int(time.time()) > written_at)  # buckets store times in whole seconds
    assert unclaimed.queue.artifacts.claim(unclaimed.queue.store.identity()) is not None
    orphan = await unclaimed.put(new_key("files"))
    unclaimed.late_s = 400 * 24 * HOUR
    assert await unclaimed.sweep() == swept(orphans=1)
    assert unclaimed.names() == before
    assert orphan.key not in unclaimed.names()


async def test_orphans_stay_where_another_database_has_the_claim(place: Place, tmp_path: Path) -> None:
    file = await place.finish(await place.make_job())
    stranger = replace(place, queue=make_queue(tmp_path, place.queue.artifacts, place.time, name="other.db"))
    stranger.late_s = 5 * 24 * HOUR
    assert await stranger.sweep() == swept()
    assert file.key in place.names()
    assert place.queue.store.identity() != stranger.queue.store.identity()
    await asyncio.to_thread(stranger.queue.store.database.close)


async def test_concurrent_sweepers_delete_each_file_once(place: Place) -> None:
    for _ in range(10):
        await place.put(new_key("files"))
    for _ in range(5):
        await place.finish(await place.make_job())
    place.late_s = 8 * 24 * HOUR
    await asyncio.gather(*(place.sweep() for _ in range(3)))
    assert place.names() == []


async def test_failing_object_store_is_swept_later(bucket: Bucket) -> None:
    await bucket.finish(await bucket.make_job())
    await bucket.put(new_key("files"))
    bucket.late_s = 8 * 24 * HOUR
    bucket.storage.proxy.faults = Faults(answer=(403, "AccessDenied"))
    assert await bucket.sweep() == swept()
    assert bucket.queue.store.operators.list_all() == []  # the files of the deleted jobs remain
    assert len(bucket.names()) == 3
    bucket.storage.proxy.faults = Faults()
    assert await bucket.sweep() == swept(orphans=3)


async def test_old_unfinished_files_are_deleted(place: Place) -> None:
    place.begin(new_key("files"))
    assert await place.sweep() == swept()
    assert await place.sweep(orphan_after_s=-HOUR) == swept(unfinished=1)
    assert place.names() == []


@pytest.fixture
def job_settings() -> JobSettings:
    """Return the job settings of the workshop."""
    return JobSettings(orphan_after_s=0.3)


async def test_runner_sweeps_regularly(workshop: Workshop) -> None:
    queue = workshop.queue
    queue.artifacts.claim(queue.store.identity())
    await queue.artifacts.put(new_key("files"), lambda: [b"x"], media_type="audio/wav", file_name="a.wav")
    await workshop.start_runner()
    await until(lambda: workshop.files() == [".owner"])
