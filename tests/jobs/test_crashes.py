"""Job runners are killed or frozen at critical moments. Still, every job ends with exactly one file and one webhook."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import sqlalchemy as sa

from stable_audio_serve.core.failpoints import Failpoint
from stable_audio_serve.core.generation import GenerationRequest, Section
from stable_audio_serve.core.settings import JobSettings, Settings
from stable_audio_serve.jobs.job import Job, JobSpec
from stable_audio_serve.jobs.open import open_queue
from stable_audio_serve.jobs.queue import JobQueue
from stable_audio_serve.jobs.store.tables import FILES
from tests.jobs.conftest import forks_of, make_spec
from tests.jobs.crash_worker import MODEL, start_worker
from tests.patience import PATIENCE_S, until
from tests.webhook_receiver import Receiver, receiving

pytestmark = pytest.mark.server

_REQUEST = GenerationRequest(prompt="rain", duration_s=1.0, seed=1, steps=4)


@pytest.fixture(scope="module")
def context() -> Iterator[ForkServerContext]:
    with forks_of("tests.jobs.crash_worker") as context:
        yield context


@dataclass
class Site:
    """A job queue, a webhook receiver, and the worker processes that a test has started."""

    settings: Settings
    context: ForkServerContext
    receiver: Receiver
    queue: JobQueue
    workers: list[BaseProcess] = field(default_factory=list)

    def work(self, failpoints: str = "") -> BaseProcess:
        worker = start_worker(self.context, self.settings, failpoints=failpoints)
        self.workers.append(worker)
        return worker

    async def submit(self) -> Job:
        return await self.queue.submit(make_spec(model=MODEL, request=_REQUEST, webhook_url=self.receiver.url))

    async def exit_code(self, worker: BaseProcess) -> int | None:
        await asyncio.to_thread(worker.join, PATIENCE_S)
        return worker.exitcode

    def files(self) -> list[str]:
        return sorted(path.name for path in Path(self.settings.output_dir).glob("*.wav"))

    async def visible(self, job: Job) -> tuple[Job, bytes]:
        """Check that the job has succeeded, with exactly one file and one webhook. Returns the job and its audio."""
        ended = await self.queue.get(job.spec.ref)
        assert ended is not None
        assert ended.result is not None, (ended.state, ended.error)
        with self.queue.store.database.reading() as connection:
            assert connection.execute(sa.select(FILES.c.key)).scalars().all() == [ended.result.file.key]
        assert {headers["webhook-id"] for _, headers, _ in self.receiver.requests} == {job.spec.id}
        return ended, b"".join([chunk async for chunk in self.queue.artifacts.read(ended.result.file)])


@pytest.fixture(params=["sqlite"])
async def site(request: pytest.FixtureRequest, tmp_path: Path, context: ForkServerContext) -> AsyncIterator[Site]:
    url = request.getfixturevalue("postgres_url") if request.param == "postgresql" else None
    jobs = JobSettings(database_url=url, lease_s=1.0, webhook_allow_hosts=("127.0.0.1",))
    settings = Settings(output_dir=str(tmp_path / "outputs"), jobs=jobs)
    async with receiving() as receiver:
        site = Site(settings, context, receiver, open_queue(settings))
        yield site
        for worker in site.workers:
            worker.kill()
            worker.join()
        await site.queue.close()


@pytest.fixture(scope="module")
def expected(context: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the audio of a job whose runner was not killed. Jobs of killed runners must have the same audio."""

    async def run() -> bytes:
        settings = Settings(output_dir=str(tmp_path_factory.mktemp("undisturbed")))
        queue = open_queue(settings)
        job = await queue.submit(make_spec(model=MODEL, request=_REQUEST))
        worker = start_worker(context, settings)
        await asyncio.to_thread(worker.join, PATIENCE_S)
        ended = await queue.get(job.spec.ref)
        assert ended is not None
        assert ended.result is not None
        audio = b"".join([chunk async for chunk in queue.artifacts.read(ended.result.file)])
        await queue.close()
        return audio

    return asyncio.run(run())


POINTS: dict[Failpoint, int] = {
    "after_lease": 2,
    "between_steps": 2,
    "before_decode": 2,
    "mid_upload": 2,
    "after_upload": 2,
    "after_commit": 1,
}
ON_POSTGRESQL = ("after_lease", "after_upload", "after_commit")


@pytest.mark.parametrize(
    ("site", "point"),
    [
        *[("sqlite", point) for point in POINTS],
        *[pytest.param("postgresql", point, marks=pytest.mark.slow) for point in ON_POSTGRESQL],
    ],
    indirect=["site"],
)
async def test_runner_killed_anywhere_leaves_one_file_and_webhook(
    site: Site, point: Failpoint, expected: bytes
) -> None:
    job = await site.submit()
    assert await site.exit_code(site.work(f"{point}=kill")) == -signal.SIGKILL
    assert await site.exit_code(site.work()) == 0
    ended, audio = await site.visible(job)
    assert audio == expected
    assert ended.attempts == POINTS[point]
    assert len(site.receiver.requests) == 1


async def test_job_that_kills_every_runner_becomes_a_dead_letter(site: Site) -> None:
    job = await site.submit()
    for _ in range(site.settings.jobs.max_attempts):
        assert await site.exit_code(site.work("between_steps=kill")) == -signal.SIGKILL
    assert await site.exit_code(site.work("between_steps=kill")) == 0
    ended = await site.queue.get(job.spec.ref)
    assert ended is not None
    assert (ended.state, ended.attempts, ended.is_dead_letter) == ("failed", site.settings.jobs.max_attempts, True)
    assert len(site.receiver.requests) == 1


@pytest.mark.parametrize(
    ("site", "point", "left"),
    [
        ("sqlite", "between_steps", []),
        pytest.param("sqlite", "after_upload", ["{}-audio.wav"], marks=pytest.mark.slow),
        pytest.param("postgresql", "after_upload", ["{}-audio.wav"], marks=pytest.mark.slow),
    ],
    indirect=["site"],
)
async def test_runner_thawed_after_its_lease_changes_nothing(
    site: Site, point: Failpoint, left: list[str], expected: bytes, tmp_path: Path
) -> None:
    job = await site.submit()
    frozen = site.work(f"{point}=stop@{tmp_path / 'stopped once'}")
    await until(lambda: is_stopped(frozen))
    assert await site.exit_code(site.work()) == 0
    ended, audio = await site.visible(job)
    visible = f"{job.spec.id}-2-audio.wav"
    assert (audio, ended.attempts) == (expected, 2)
    assert site.files() == sorted([visible, *(name.format(job.spec.id) for name in left)])
    assert frozen.pid is not None
    os.kill(frozen.pid, signal.SIGCONT)
    assert await site.exit_code(frozen) == 0
    assert site.files() == [visible]
    assert await site.visible(job) == (ended, audio)
    assert len(site.receiver.requests) == 1


_SECTIONS = (Section(1.0), *[Section(1.0, f"rain {number}") for number in range(3)])
_PIECE = replace(_REQUEST, duration_s=float(len(_SECTIONS)))


def make_piece() -> JobSpec:
    """Return a long piece of four sections of a second each."""
    return make_spec(model=MODEL, mode="long-piece", request=_PIECE, sections=_SECTIONS, overlap_s=0.5)


async def test_long_piece_goes_on_with_the_section_its_runner_died_in(
    site: Site, context: ForkServerContext, tmp_path: Path
) -> None:
    undisturbed = Settings(output_dir=str(tmp_path / "undisturbed"))
    queue = open_queue(undisturbed)
    expected = await queue.submit(make_piece())
    other = start_worker(context, undisturbed)
    job = await site.queue.submit(make_piece())
    worker = site.work("after_section=stop")  # it freezes after each section, before the section is added to the job
    assert worker.pid is not None
    for number in range(2):
        await until(lambda: is_stopped(worker))
        os.kill(worker.pid, signal.SIGCONT)
        while len(await site.queue.sections(job.spec.ref)) == number:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
    await until(lambda: is_stopped(worker))
    worker.kill()
    assert await site.exit_code(worker) == -signal.SIGKILL
    before = await site.queue.sections(job.spec.ref)
    assert len(before) == 2
    assert await site.exit_code(site.work()) == 0
    after = await site.queue.sections(job.spec.ref)
    assert after[: len(before)] == before
    assert len(after) == 4
    await site.exit_code(other)
    assert await read(site.queue, job) == await read(queue, expected)
    now = await site.queue.get(job.spec.ref)
    assert now is not None
    assert now.attempts == 1  # since the last finished section
    messages = [event.message for event in await site.queue.events(job.spec.ref)]
    assert messages.count("started") == 2
    await queue.close()


@pytest.mark.parametrize("site", ["sqlite"], indirect=True)
async def test_section_stored_before_the_crash_is_made_again(site: Site, tmp_path: Path) -> None:
    job = await site.queue.submit(make_piece())
    assert await site.exit_code(site.work(f"after_section=kill@{tmp_path / 'killed once'}")) == -signal.SIGKILL
    (orphan,) = (Path(site.settings.output_dir) / "sections").iterdir()
    assert await site.exit_code(site.work()) == 0
    sections = await site.queue.sections(job.spec.ref)
    assert len(sections) == 4
    stored = Path(site.settings.output_dir) / sections[0].file.key
    assert stored != orphan
    assert stored.read_bytes() == orphan.read_bytes()


async def read(queue: JobQueue, job: Job) -> bytes:
    """Return the audio file of a job that has succeeded."""
    ended = await queue.get(job.spec.ref)
    assert ended is not None
    assert ended.result is not None, (ended.state, ended.error)
    return b"".join([chunk async for chunk in queue.artifacts.read(ended.result.file)])


def is_stopped(process: BaseProcess) -> bool:
    state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state == "T"
