from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
import structlog
from fastapi import FastAPI

from stable_audio_serve.api.app import create_app
from stable_audio_serve.api.webhook_bodies import webhook_bodies
from stable_audio_serve.core.settings import ApiSettings, JobSettings, Settings
from stable_audio_serve.jobs.job import Job, JobRef
from stable_audio_serve.jobs.open import open_queue
from stable_audio_serve.jobs.queue import JobQueue
from stable_audio_serve.jobs.runner.runner import JobRunner
from stable_audio_serve.jobs.store.outbox import Outbox
from stable_audio_serve.jobs.store.tables import JOBS
from stable_audio_serve.jobs.webhooks.notifier import Notifier
from tests import backends
from tests.backends import ToneBackend
from tests.quick_apps import build_quickly

build_quickly()


@pytest.fixture(autouse=True)
def _plain_logs(_restored_logging: None) -> None:
    structlog.configure([structlog.processors.format_exc_info, structlog.processors.LogfmtRenderer()])


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Returns the settings of the application that the tests share: the defaults, with a temporary folder for jobs."""
    jobs = JobSettings(webhook_allow_hosts=("127.0.0.1", "localhost"))
    api = ApiSettings(allowed_hosts=("audio.example.com", "a.example", "example.org", "fal.run"))
    return Settings(output_dir=str(tmp_path_factory.mktemp("outputs")), jobs=jobs, api=api)


@pytest.fixture(scope="session")
def jobs(settings: Settings) -> JobQueue:
    """Returns the job queue of the shared application. Jobs stay queued in tests without the fixture `runner`."""
    return open_queue(settings)


@pytest.fixture
async def runner(jobs: JobQueue, backend: ToneBackend, settings: Settings) -> AsyncIterator[JobRunner]:
    """Run the shared application's jobs during one test. Jobs of other tests are removed first."""
    with jobs.store.database.writing() as connection:
        connection.execute(JOBS.delete())
    notifier = Notifier(Outbox(jobs.store.database), webhook_bodies(jobs.artifacts), settings=settings.jobs)
    runner = JobRunner(jobs.store, jobs.artifacts, backend=backend, settings=settings, notifier=notifier)
    await runner.start()
    jobs.wake = runner.wake
    yield runner
    jobs.wake = lambda: None
    await runner.close()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns a list to which a job's id is added each time the job's state or queue position is read."""
    ids: list[str] = []
    get, position = JobQueue.get, JobQueue.position

    async def get_and_count(jobs: JobQueue, ref: JobRef) -> Job | None:
        ids.append(ref.id)
        return await get(jobs, ref)

    async def position_and_count(jobs: JobQueue, job: Job) -> int | None:
        ids.append(job.spec.ref.id)
        return await position(jobs, job)

    monkeypatch.setattr(JobQueue, "get", get_and_count)
    monkeypatch.setattr(JobQueue, "position", position_and_count)
    return ids


@pytest.fixture(scope="session")
def shared(settings: Settings, jobs: JobQueue) -> Iterator[tuple[FastAPI, ToneBackend]]:
    """Returns one application for all tests with default settings, because building it is slow."""
    backend = ToneBackend()
    app = create_app(backend, settings, jobs=jobs)
    yield app, backend

    async def run_lifespan() -> None:
        async with app.router.lifespan_context(app):
            pass

    asyncio.run(run_lifespan())


@pytest.fixture
def backend(shared: tuple[FastAPI, ToneBackend]) -> ToneBackend:
    """Returns the shared application's backend, reset."""
    backend = shared[1]
    vars(backend).update(vars(ToneBackend()))
    return backend


@pytest.fixture
def low_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test backend generate audio at 8 kHz, for tests of long clips that do not read the samples."""
    monkeypatch.setattr(backends, "RATE_HZ", 8000)


@pytest.fixture
async def client(shared: tuple[FastAPI, ToneBackend], backend: ToneBackend) -> AsyncIterator[httpx.AsyncClient]:
    """Returns a client of the shared application, without a socket."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(shared[0]), base_url="http://localhost") as client:
        yield client
