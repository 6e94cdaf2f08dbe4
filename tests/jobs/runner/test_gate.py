"""How a job runner acts while files cannot be stored: what it reports, which jobs it starts, how it recovers."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from stable_audio_serve.artifacts.store import Chunks, StoredFile
from stable_audio_serve.core.errors import StorageError, StorageFullError, StoreMovedError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, ProgressCallback, Section
from stable_audio_serve.core.ids import ArtifactKey
from stable_audio_serve.core.settings import JobSettings, Settings
from stable_audio_serve.jobs.open import open_queue
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.health import Refusals, StoreHealth, StoreState, health_of
from tests.backends import ToneBackend
from tests.jobs.conftest import SHORT_PAUSES, Workshop, make_spec, upload
from tests.jobs.stores import Wall, database, postgres_with_tables, store_url, wall
from tests.object_storage import Faults, ObjectStorage
from tests.patience import until
from tests.recorded_metrics import RecordedMetrics

__all__ = ["database", "postgres_with_tables", "store_url", "wall"]

REFUSED = "job_files_refused"


@dataclass
class WatchedBackend(ToneBackend):
    """A test backend that records, at the start of each request, how many requests are running."""

    at_work: list[int] = field(default_factory=list)

    async def generate(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
    ) -> GenerationResult:
        self.at_work.append(self.num_running + 1)
        return await super().generate(model, request)


@pytest.fixture
async def separate_folders(tmp_path: Path) -> AsyncIterator[Workshop]:
    """Yield a workshop whose files and whose database are in different folders."""
    jobs = JobSettings(database_url=f"sqlite:///{tmp_path / 'jobs.db'}")
    settings = Settings(output_dir=str(tmp_path / "outputs"), jobs=jobs)
    workshop = Workshop(settings, open_queue(settings), WatchedBackend())
    yield workshop
    for runner in workshop.runners:
        await runner.close()
    await workshop.queue.close()


@contextmanager
def folder_away(workshop: Workshop) -> Iterator[None]:
    folder = Path(workshop.settings.output_dir)
    away = folder.rename(folder.with_name("away"))
    yield
    away.rename(folder)


async def test_one_job_probes_after_a_refusal_and_two_follow(separate_folders: Workshop) -> None:
    backend, metrics = separate_folders.backend, RecordedMetrics()
    assert isinstance(backend, WatchedBackend)
    await separate_folders.start_runner(metrics=metrics)
    await separate_folders.finished(await separate_folders.queue.submit(make_spec()))
    refusals = Refusals(separate_folders.queue.store.database)
    with folder_away(separate_folders):
        jobs = [await separate_folders.queue.submit(make_spec(duration_s=0.1)) for _ in range(12)]
        list_all = separate_folders.queue.store.operators.list_all
        await until(lambda: metrics.gauges.get(REFUSED) == 1.0 and not list_all(state="running"))
        await until(lambda: [health.state for health in refusals.current()] == ["moved"])
        assert len([job for job in jobs if separate_folders.queue.store.clients.get(job.spec.ref)]) == 12
        backend.at_work.clear()
        backend.delay_s = 0.05
    assert {(await separate_folders.finished(job)).state for job in jobs} == {"succeeded"}
    assert backend.at_work[0] == 1
    assert max(backend.at_work[1:3]) <= 2
    assert metrics.gauges[REFUSED] == 0.0
    assert refusals.current() == []


async def test_file_that_never_fits_makes_a_retryable_dead_letter(tiny_disk: Path, tmp_path: Path) -> None:
    jobs = JobSettings(database_url=f"sqlite:///{tmp_path / 'jobs.db'}", max_attempts=2)
    for place, state in ((tiny_disk, "failed"), (tmp_path / "roomy", "succeeded")):
        settings = Settings(output_dir=str(place), jobs=jobs)
        workshop = Workshop(settings, open_queue(settings))
        dead = workshop.queue.store.operators.list_all(dead_letters=True)
        job = workshop.queue.store.dead_letters.retry_job(dead[0].spec.ref) if dead else None
        runner = await workshop.start_runner()
        ended = await workshop.finished(job or await workshop.queue.submit(make_spec(duration_s=10.0)))
        assert (ended.state, ended.is_dead_letter) == (state, state == "failed")
        await runner.close()
        await workshop.queue.close()


@pytest.mark.parametrize("job_settings", [JobSettings(max_attempts=20)])
async def test_file_that_never_fits_lets_other_jobs_go_first(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, probe, is_full = workshop.queue.artifacts.put, workshop.queue.artifacts.probe, threading.Event()

    async def refuse_large(key: ArtifactKey, chunks: Chunks, *, media_type: str, file_name: str) -> StoredFile:
        if is_full.is_set() or sum(map(len, chunks())) > 250_000:
            raise StorageFullError("the disk is full")
        return await put(key, chunks, media_type=media_type, file_name=file_name)

    async def probe_space(num_bytes: int) -> None:
        if is_full.is_set():
            raise StorageFullError("the disk is full")
        await probe(num_bytes)

    monkeypatch.setattr(workshop.queue.artifacts, "put", refuse_large)
    monkeypatch.setattr(workshop.queue.artifacts, "probe", probe_space)
    is_full.set()
    large = await workshop.queue.submit(make_spec(duration_s=2.0))
    # The large job is due again at once, unless it waits for the other job.
    await workshop.start_runner(pauses=replace(SHORT_PAUSES, retry_s=0.0, probe_s=0.2, last_probe_s=0.4))
    await workshop.until(large, lambda job: job.attempts == 1 and job.state == "queued")
    small = await workshop.queue.submit(make_spec())
    is_full.clear()
    assert (await workshop.finished(small)).state == "succeeded"
    now = await workshop.queue.get(large.spec.ref)
    assert now is not None
    assert not now.is_over
    assert (await workshop.finished(large)).is_dead_letter


async def test_runner_starts_jobs_again_after_a_probe_that_broke(
    separate_folders: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_broken, probe = threading.Event(), separate_folders.queue.artifacts.probe

    async def break_once(num_bytes: int) -> None:
        if is_broken.is_set():
            return await probe(num_bytes)
        is_broken.set()
        raise RuntimeError("a bug")

    monkeypatch.setattr(separate_folders.queue.artifacts, "probe", break_once)
    await separate_folders.start_runner()
    await separate_folders.finished(await separate_folders.queue.submit(make_spec()))
    with folder_away(separate_folders):
        job = await separate_folders.queue.submit(make_spec())
        await until(is_broken.is_set)
    assert (await separate_folders.finished(job)).state == "succeeded"


@pytest.mark.parametrize("is_long", [False, True])
async def test_storage_error_of_an_engine_pauses_no_other_jobs(workshop: Workshop, *, is_long: bool) -> None:
    metrics = RecordedMetrics()
    workshop.backend.error = StorageError("the adapter's file could not be downloaded")
    await workshop.start_runner(metrics=metrics)
    spec = make_spec(sections=(Section(1.0), Section(1.0))) if is_long else make_spec()
    job = await workshop.queue.submit(spec)
    await workshop.until(job, lambda job: job.attempts >= 1 and job.state == "queued")
    assert REFUSED not in metrics.gauges
    workshop.backend.error = None
    assert (await workshop.finished(job)).state == "succeeded"


@pytest.mark.server
async def test_unreadable_uploads_cost_few_attempts(
    object_storage: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = object_storage.settings(object_storage.make_bucket())
    settings = Settings(output_dir=str(tmp_path), storage=storage)
    workshop = Workshop(settings, open_queue(settings))
    jobs = [await workshop.queue.submit(make_spec(upload=await upload(workshop))) for _ in range(8)]
    object_storage.proxy.faults = Faults(answer=(403, "AccessDenied"))
    metrics = RecordedMetrics()
    probes: list[int] = []
    probe = workshop.queue.artifacts.probe

    async def count(num_bytes: int) -> None:
        probes.append(num_bytes)
        await probe(num_bytes)

    monkeypatch.setattr(workshop.queue.artifacts, "probe", count)
    runner = await workshop.start_runner(metrics=metrics)
    list_all = workshop.queue.store.operators.list_all
    await until(lambda: metrics.gauges.get(REFUSED) == 1.0 and not list_all(state="running"))
    await until(lambda: len(probes) >= 3)
    waiting = list_all(state="queued")
    assert len(waiting) == len(jobs)
    assert sum(job.attempts for job in waiting) <= 4  # a runner starts four jobs before it notices
    object_storage.proxy.faults = Faults()
    assert {(await workshop.finished(job)).state for job in jobs} == {"succeeded"}
    await runner.close()
    await workshop.queue.close()


async def test_stopping_runner_withdraws_its_refusal(
    separate_folders: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, is_recording, is_recorded = Refusals.record, threading.Event(), threading.Event()

    def record_late(*args: Any, **kwargs: Any) -> None:
        is_recording.set()
        time.sleep(0.1)  # so `close` begins before the refusal is in the database
        record(*args, **kwargs)
        is_recorded.set()

    runner = await separate_folders.start_runner()
    await separate_folders.finished(await separate_folders.queue.submit(make_spec()))
    refusals = Refusals(separate_folders.queue.store.database)
    with folder_away(separate_folders):
        await separate_folders.queue.submit(make_spec())
        await until(lambda: len(refusals.current()) == 1)
        monkeypatch.setattr(Refusals, "record", record_late)
        await until(is_recording.is_set)
        await runner.close()
        await until(is_recorded.is_set)
        assert refusals.current() == []


def test_refusals_are_visible_until_they_expire(database: Database, wall: Wall) -> None:
    refusals = Refusals(database)
    assert refusals.current() == []
    full, moved = StoreHealth("full", "the disk is full"), StoreHealth("moved", "elsewhere")
    refusals.record("a", moved, for_s=5)
    refusals.record("a", full, for_s=10)
    refusals.record("b", moved, for_s=20)
    assert refusals.current() == [moved, full]
    wall.now += 10
    assert refusals.current() == [moved]
    refusals.withdraw("b")
    refusals.withdraw("nobody")
    assert refusals.current() == []


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (StorageError("no answer"), "unavailable"),
        (StorageFullError("the disk is full"), "full"),
        (StoreMovedError("elsewhere"), "moved"),
    ],
)
def test_store_error_maps_to_its_state(error: StorageError, state: StoreState) -> None:
    assert health_of(error) == StoreHealth(state, error.message)
