"""While a new version replaces an old one, runners of both versions share a job database, and no job is lost."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from stable_audio_serve.core.settings import JobSettings, Settings
from stable_audio_serve.jobs.job import Job
from stable_audio_serve.jobs.open import open_queue
from stable_audio_serve.jobs.queue import JobQueue
from tests.jobs.conftest import make_spec
from tests.jobs.stores import KINDS
from tests.patience import PATIENCE_S

pytestmark = [pytest.mark.slow, pytest.mark.server]


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of a database without tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.db'}"
    found: str = request.getfixturevalue("postgres_url")
    return found


@contextmanager
def runner(version: str, url: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a job runner of the version "this", or of a simulated version "next", in a process until the context ends."""
    command = [sys.executable, "-m", "tests.jobs.versions", version, url, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> int:
    """Stop a runner. Return the number of attempts that it has begun."""
    output, _ = process.communicate(timeout=PATIENCE_S)
    return int(output)


def scalar(queue: JobQueue, query: str) -> int:
    with queue.store.database.reading() as connection:
        return int(connection.execute(sa.text(query)).scalar_one())


class Customer:
    """Submits jobs to the queue, as a server of this version does."""

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self.jobs: list[Job] = []

    async def submit(self, number: int) -> None:
        self.jobs += [await self._queue.submit(make_spec()) for _ in range(number)]

    async def keep_both_busy(self) -> None:
        """Submit jobs until a runner of each version has finished at least three."""
        before = self._num_of_versions()
        async with asyncio.timeout(PATIENCE_S):
            while any(now < then + 3 for now, then in zip(self._num_of_versions(), before, strict=True)):
                await self.submit(4)
                await asyncio.sleep(0.05)

    async def ended(self) -> list[Job]:
        """Wait until all jobs have ended, and return them."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = [await self._queue.get(job.spec.ref) for job in self.jobs]
                if all(job is not None and job.is_over for job in found):
                    return [job for job in found if job is not None]
                await asyncio.sleep(0.1)

    def _num_of_versions(self) -> tuple[int, int]:
        newer = scalar(self._queue, "SELECT count(*) FROM made_up")
        return newer, scalar(self._queue, "SELECT count(*) FROM jobs WHERE state = 'succeeded'") - newer


async def test_runners_of_two_versions_share_the_jobs_of_one_database(url: str, tmp_path: Path) -> None:
    queue = open_queue(Settings(output_dir=str(tmp_path), jobs=JobSettings(database_url=url, max_queued=10_000)))
    customer = Customer(queue)
    with runner("this", url, tmp_path) as old:
        assert read_line(old) == "ready"
        await customer.submit(40)
        with runner("next", url, tmp_path) as new:  # this runner upgrades the tables while the older runner works
            assert read_line(new) == "ready"
            await customer.keep_both_busy()
            with runner("this", url, tmp_path) as late:  # a runner of this version that starts with the newer tables
                assert read_line(late) == "ready"
                num_old = end(old)
                await customer.keep_both_busy()
                jobs = await customer.ended()
                num_new, num_late = end(new), end(late)
    assert {(job.state, job.attempts) for job in jobs} == {("succeeded", 1)}
    assert min(num_old, num_new, num_late) > 0
    # The old runner put up to two jobs back into the queue when it stopped, and another runner began them again.
    assert num_old + num_new + num_late - len(jobs) in (0, 1, 2)
    assert scalar(queue, "SELECT count(*) FROM made_up") == num_new
    assert (
        scalar(queue, "SELECT count(*) FROM jobs WHERE made_up_work_s = 0 AND made_up_note IS NULL")
        == len(jobs) - num_new
    )
    # `purge` also deletes rows in the newer version's table, which this version does not know.
    while queue.store.retention.purge(age_s=0.0):
        pass
    assert scalar(queue, "SELECT count(*) FROM jobs") == scalar(queue, "SELECT count(*) FROM made_up") == 0
    await queue.close()
    print(f"{len(jobs)} jobs: {num_old} by the old one, {num_new} by the new one, {num_late} by the late one")
