"""Fixtures with job stores in SQLite and PostgreSQL, a clock that tests advance, and helper functions."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.core.errors import StableAudioError
from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs.job import Contract, Job, JobError, JobRef, JobResult, JobSpec
from stable_audio_serve.jobs.store.client_jobs import Added
from stable_audio_serve.jobs.store.database import Database, database_url
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.outbox import Notice, Outbox
from stable_audio_serve.jobs.store.runner_jobs import Report
from stable_audio_serve.jobs.store.tables import JOBS, METADATA
from tests.databases import PostgresServer
from tests.jobs.conftest import make_spec

__all__ = ["contract_store_url", "database", "postgres_with_tables", "store", "store_url", "wall"]

KINDS = ("sqlite", pytest.param("postgresql", marks=[pytest.mark.server, pytest.mark.slow]))
# For tests of what every job store must do. They run with both databases even when slow tests are left out.
CONTRACT_KINDS = ("sqlite", pytest.param("postgresql", marks=pytest.mark.server))
LEASE_S = 15.0
FILE = StoredFile("k-a.wav", "audio/wav", "a.wav", 3, "0" * 64)
RESULT = JobResult(FILE, "f" * 32, 44100, (7,), 1.5)
ERROR = JobError("invalid", "steps: too many", "steps")


@dataclass
class Wall:
    """A clock that stands still until a test changes `now`."""

    now: float = 1_790_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def wall() -> Wall:
    return Wall()


@functools.cache
def _make_tables(postgres: PostgresServer) -> str:
    url = postgres.create_database()
    open_database(url).prepare()
    return url


@pytest.fixture(scope="session")
def postgres_with_tables(postgres: PostgresServer) -> str:
    """Return the URL of a database for all tests of this process. Emptying it is faster than creating another one."""
    return _make_tables(postgres)


def _url_of(kind: str, request: pytest.FixtureRequest, folder: Path) -> str:
    if kind == "sqlite":
        return f"sqlite:///{folder / 'jobs' / 'jobs.db'}"
    url: str = request.getfixturevalue("postgres_with_tables")
    empty(url)
    return url


@pytest.fixture(params=KINDS)
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty job database."""
    return _url_of(request.param, request, tmp_path)


@pytest.fixture(params=CONTRACT_KINDS)
def contract_store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty job database. Tests use SQLite and PostgreSQL even if slow tests are left out.

    Modules that test what every job store must do import this fixture `as store_url`.
    """
    return _url_of(request.param, request, tmp_path)


@pytest.fixture
def database(store_url: str, wall: Wall) -> Iterator[Database]:
    database = open_database(store_url, wall)
    yield database
    database.close()


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore(database, JobSettings(max_queued=50, max_queued_per_key=40))


def open_database(url: str, wall: Wall | None = None) -> Database:
    return Database(database_url(url, Path("/nowhere")), now=wall)


def empty(url: str) -> None:
    """Delete everything that tests have added to a PostgreSQL database."""
    with psycopg.connect(url) as connection:
        connection.execute(f"TRUNCATE {', '.join(METADATA.tables)} RESTART IDENTITY CASCADE".encode())


def add(store: JobStore, **overrides: Any) -> Job:
    """Add a job made by `make_spec` with these overrides, and return it."""
    return add_spec(store, make_spec(**overrides))


def submit(store: JobStore, spec: JobSpec) -> Added:
    """Submit one job. Raises the error if the store refuses it."""
    (outcome,) = store.clients.add_all([spec])
    if isinstance(outcome, StableAudioError):
        raise outcome
    return outcome


def add_spec(store: JobStore, spec: JobSpec) -> Job:
    added = submit(store, spec)
    assert added.is_new
    return added.job


def fill(store: JobStore, count: int, *, state: str, client: str = "") -> None:
    """Add `count` jobs in this state to the database, in one SQL statement."""
    template = submit(store, make_spec(model="demo", client=client)).job.spec.id
    copied = [column for column in JOBS.c if column.name not in ("seq", "id", "state", "completed_at")]
    number = sa.select(sa.literal(1).label("n")).cte("numbers", recursive=True)
    number = number.union_all(sa.select(number.c.n + 1).where(number.c.n < count))
    own = {
        "id": sa.literal(f"{uuid.uuid4().hex}-") + sa.cast(number.c.n, sa.Text),
        "state": sa.literal(state),
        "completed_at": sa.null() if state == "queued" else JOBS.c.created_at + number.c.n * 1e-6,
    }
    rows = sa.select(*copied, *own.values()).select_from(JOBS.join(number, sa.true())).where(JOBS.c.id == template)
    with store.database.writing() as connection:
        connection.execute(sa.insert(JOBS).from_select([*(column.name for column in copied), *own], rows))
        connection.execute(sa.delete(JOBS).where(JOBS.c.id == template))


def ref(job_id: str, *, contract: Contract = "sa3", client: str = "") -> JobRef:
    return JobRef(contract, client, job_id)


def find(store: JobStore, job: Job) -> Job:
    found = store.clients.get(job.spec.ref)
    assert found is not None
    return found


def lease(store: JobStore, owner: str = "me", **options: Any) -> Job:
    job = store.runners.lease(owner, lease_s=LEASE_S, **options)
    assert job is not None
    return job


def report(store: JobStore, job: Job, **progress: Any) -> bool:
    """Report a job's progress in the role of its runner. Returns whether the runner's lease was still valid."""
    return store.runners.report([Report(job, **progress)]) == []


def leased_ids(store: JobStore, number: int) -> list[str]:
    return [lease(store).spec.id for _ in range(number)]


def result_of(job: Job) -> JobResult:
    """Return a result for this attempt of the job. Its file differs from that of any other attempt."""
    assert job.lease is not None
    key = f"{'-'.join(job.spec.ref)}-{job.lease.fence}.wav"
    return JobResult(StoredFile(key, "audio/wav", "a.wav", 3, "0" * 64), f"file-{key}", 44100, (7,), 1.5)


def end_in_every_way(store: JobStore, job: Job) -> list[Job | None]:
    """Call each of the four operations with which a runner can end a job. Return the results: each None if refused."""
    return [
        store.runners.succeed(job, RESULT),
        store.runners.fail(job, ERROR),
        store.runners.stop(job),
        store.runners.requeue(job, delay_s=0, attempts=0, message="x"),
    ]


def dead_letter(store: JobStore, **overrides: Any) -> Job:
    add(store, **overrides)
    ended = store.runners.fail(lease(store), ERROR, is_dead_letter=True)
    assert ended is not None
    return ended


def claim(outbox: Outbox, **options: Any) -> Notice:
    notice = outbox.claim(for_s=60, **options)
    assert notice is not None
    return notice
