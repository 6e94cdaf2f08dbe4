"""The job store used by several processes at once. The tests share a pool of processes, which starts slowly."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest

from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.key_uses import KeyUses
from tests.jobs.conftest import forks_of
from tests.jobs.store.test_database import empty_url
from tests.jobs.store.test_key_uses import BOB, count
from tests.jobs.stores import Wall, add, open_database, postgres_with_tables, store_url

__all__ = ["empty_url", "postgres_with_tables", "store_url"]

pytestmark = pytest.mark.server

_MANY = JobSettings(max_queued=10_000)


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of three processes. They are forks of one process that has imported this module."""
    with forks_of(__name__) as context, ProcessPoolExecutor(3, mp_context=context) as pool:
        yield pool


@pytest.fixture
def database(store_url: str) -> Iterator[Database]:
    """Yield a job database that uses real time."""
    database = open_database(store_url)
    yield database
    database.close()


def lease_all(url: str, owner: str) -> list[str]:
    """Lease jobs until none is left, and return their ids. Called in several processes at once."""
    store = JobStore(open_database(url))
    ids = []
    while job := store.runners.lease(owner, lease_s=60):
        ids.append(job.spec.id)
    store.database.close()
    return ids


def test_processes_never_lease_the_same_job(database: Database, store_url: str, processes: ProcessPoolExecutor) -> None:
    store = JobStore(database, _MANY)
    expected = {add(store).spec.id for _ in range(60)}
    shares = processes.map(lease_all, [store_url] * 3, "abc")
    ids = list(itertools.chain(*shares))
    assert len(ids) == 60
    assert set(ids) == expected


def prepare(url: str, job_id: str) -> None:
    """Create or upgrade the tables, and add a job. Called in another process."""
    database = open_database(url)
    database.prepare()
    add(JobStore(database), id=job_id)
    database.close()


@pytest.mark.parametrize("_", [0, *(pytest.param(turn, marks=pytest.mark.slow) for turn in range(1, 5))])
def test_many_processes_can_start_at_once(empty_url: str, processes: ProcessPoolExecutor, _: int) -> None:
    list(processes.map(prepare, [empty_url] * 6, "abcdef"))
    database = open_database(empty_url)
    assert JobStore(database).operators.counts() == {"queued": 6}
    database.close()


def hammer(url: str, times: int) -> int:
    """Make requests until `times` of them are refused. Returns how many were admitted. Runs in another process.

    Its clock stands still, so that no minute ends while other processes start.
    """
    uses = KeyUses(open_database(url, Wall()))
    num_admitted = num_refused = 0
    while num_refused < times:
        admitted = count(uses, 1, rate=50) + count(uses, 1, rate=50, client=BOB)
        num_admitted, num_refused = num_admitted + admitted, num_refused + (not admitted)
    return num_admitted


def test_last_second_goes_to_one_of_several_processes(store_url: str, processes: ProcessPoolExecutor) -> None:
    open_database(store_url).prepare()
    futures: list[Future[int]] = [processes.submit(hammer, store_url, 20) for _ in range(3)]
    assert sum(future.result() for future in futures) == 100
