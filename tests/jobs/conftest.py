from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, ProgressCallback
from stable_audio_serve.core.settings import JobSettings, Settings
from stable_audio_serve.jobs.job import Job, JobSpec, JobUpload
from stable_audio_serve.jobs.open import open_artifacts
from stable_audio_serve.jobs.queue import JobQueue
from stable_audio_serve.jobs.runner.attempt import RunnerPauses
from stable_audio_serve.jobs.runner.runner import JobRunner
from stable_audio_serve.jobs.store.database import Database, database_url
from stable_audio_serve.jobs.store.job_store import JobStore
from tests.audio_files import make_audio_file
from tests.backends import ToneBackend
from tests.patience import PATIENCE_S

SHORT_PAUSES = RunnerPauses(
    first_poll_s=0.05,
    last_poll_s=0.2,
    report_s=0.05,
    store_retry_s=0.05,
    retry_s=0.02,
    probe_s=0.02,
    last_probe_s=0.05,
)

_NUMBERS = itertools.count()


def make_spec(**overrides: Any) -> JobSpec:
    """Return the `JobSpec` of a new job for one second of audio, with `overrides` of its fields."""
    chosen = {name: overrides.pop(name) for name in ("duration_s", "priority") if name in overrides}
    request = GenerationRequest(**{"prompt": "rain", "duration_s": 1.0, "seed": 7, **chosen})
    fields: dict[str, Any] = {
        "id": f"{next(_NUMBERS):032x}",
        "contract": "sa3",
        "model": "small-sfx",
        "mode": "text-to-audio",
        "request": request,
    }
    return JobSpec(**fields | overrides)


@dataclass
class Workshop:
    """A job queue with its files in a local folder, a test backend, and the job runners that the test has started."""

    settings: Settings
    queue: JobQueue
    backend: ToneBackend = field(default_factory=ToneBackend)
    runners: list[JobRunner] = field(default_factory=list)

    async def start_runner(self, **options: Any) -> JobRunner:
        runner = JobRunner(
            self.queue.store,
            self.queue.artifacts,
            backend=self.backend,
            settings=self.settings,
            **{"pauses": SHORT_PAUSES, **options},
        )
        self.runners.append(runner)
        await runner.start()
        self.queue.wake = runner.wake
        return runner

    async def until(self, job: Job, condition: Callable[[Job], bool], *, longest_pause_s: float = 0.01) -> Job:
        pause_s = 0.01
        async with asyncio.timeout(PATIENCE_S):
            while not condition(job):
                await asyncio.sleep(pause_s)
                pause_s = min(1.5 * pause_s, longest_pause_s)
                found = await self.queue.get(job.spec.ref)
                assert found is not None
                job = found
        return job

    async def finished(self, job: Job) -> Job:
        return await self.until(job, lambda job: job.is_over, longest_pause_s=0.05)

    def files(self) -> list[str]:
        """Return the names of all stored files except the database."""
        folder = Path(self.settings.output_dir)
        paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("jobs.db"))
        return sorted(str(path.relative_to(folder)) for path in paths)


@dataclass
class CountingBackend(ToneBackend):
    """A test backend that records the highest number of requests that ran at once."""

    most_running: int = 0

    async def generate(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
    ) -> GenerationResult:
        self.most_running = max(self.most_running, self.num_running + 1)
        return await super().generate(model, request)


@contextmanager
def forks_of(*modules: str) -> Iterator[ForkServerContext]:
    """Yield a multiprocessing context whose processes are forks of one process that has imported `modules`.

    Multiprocessing starts this process once and keeps it. So it is stopped at the end, because the processes of another
    context would be forked from it too and would import their own modules again and again.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    yield context
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    if server._forkserver_pid is not None:  # killed, because Python would free all objects first, which takes seconds
        os.kill(server._forkserver_pid, signal.SIGKILL)
    server._stop()


async def upload(workshop: Workshop, *, role: Any = "init") -> JobUpload:
    data = make_audio_file(duration_s=0.5)
    file = await workshop.queue.put_upload(lambda: [data], media_type="audio/wav", file_name="a.wav")
    return JobUpload(file, role, max_s=10.0, decoded_bytes=2 * 22050 * 4)


@pytest.fixture
def job_settings() -> JobSettings:
    """Return the job settings of the workshop. Modules and classes that need other settings override this fixture."""
    return JobSettings()


@pytest.fixture
def now() -> Callable[[], float] | None:
    """Return the clock of the job database. None = real time. Modules that need another clock override this fixture."""
    return None


@pytest.fixture
async def workshop(
    tmp_path: Path, job_settings: JobSettings, now: Callable[[], float] | None
) -> AsyncIterator[Workshop]:
    settings = Settings(output_dir=str(tmp_path / "outputs"), jobs=job_settings)
    database = Database(database_url(settings.jobs.database_url, Path(settings.output_dir)), now=now)
    workshop = Workshop(settings, JobQueue(JobStore(database, settings.jobs), open_artifacts(settings)))
    yield workshop
    for runner in workshop.runners:
        await runner.close()
    await workshop.queue.close()
