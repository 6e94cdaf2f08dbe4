"""The job store used by concurrent threads: no job is lost or run twice, and all limits hold."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from stable_audio_serve.core.errors import ConflictError, OverloadedError, QuotaError
from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs.job import Job
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.runner_jobs import Report
from tests.jobs.conftest import make_spec
from tests.jobs.stores import (
    ERROR,
    LEASE_S,
    Wall,
    add,
    find,
    lease,
    open_database,
    postgres_with_tables,
    result_of,
    submit,
    wall,
)
from tests.jobs.stores import contract_store_url as store_url

__all__ = ["postgres_with_tables", "store_url", "wall"]

_MANY = JobSettings(max_queued=10_000)

# These tests are mainly for PostgreSQL. On SQLite, which has one writer at a time, they are marked as slow.
on_postgresql = pytest.mark.parametrize(
    "store_url",
    [pytest.param("sqlite", marks=pytest.mark.slow), pytest.param("postgresql", marks=pytest.mark.server)],
    indirect=True,
)


@pytest.fixture
def database(store_url: str) -> Iterator[Database]:
    """Yield a job database that uses real time."""
    database = open_database(store_url)
    yield database
    database.close()


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """Start all calls at the same time, each in a thread. Return their results, or the errors that they raised."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        barrier.wait()
        try:
            return call()
        except (ConflictError, OverloadedError) as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def test_threads_never_lease_the_same_job(database: Database) -> None:
    store = JobStore(database, _MANY)
    expected = {add(store).spec.id for _ in range(30)}

    def lease_them(owner: str) -> list[str]:
        ids = []
        while job := store.runners.lease(owner, lease_s=60):
            ids.append(job.spec.id)
        return ids

    ids = list(itertools.chain(*at_once([partial(lease_them, owner) for owner in "abcdef"])))
    assert len(ids) == 30
    assert set(ids) == expected


@on_postgresql
def test_clients_take_turns_with_many_runners(database: Database) -> None:
    store = JobStore(database, _MANY)
    for _ in range(15):
        for client in "klmno":
            add(store, client=client)

    def lease_some(owner: str) -> list[str]:
        return [lease(store, owner).spec.client for _ in range(15)]

    clients = list(itertools.chain(*at_once([partial(lease_some, owner) for owner in "abcd"])))
    assert len(clients) == 60
    assert {client: clients.count(client) for client in "klmno"} == dict.fromkeys("klmno", 12)


@on_postgresql
def test_changes_to_many_jobs_never_deadlock(database: Database) -> None:
    store = JobStore(database, _MANY)
    jobs = [lease(store) for job in [add(store) for _ in range(20)]]
    reports = [Report(job, "denoising", 0.5) for job in jobs]
    renew = partial(store.runners.renew, "me", lease_s=60, refs=[job.spec.ref for job in jobs])
    for _ in range(5):
        forwards, backwards, held = at_once(
            [partial(store.runners.report, reports), partial(store.runners.report, reports[::-1]), renew]
        )
        assert forwards == backwards == []
        assert len(held) == len(jobs)


@pytest.mark.parametrize("by", ["key", "id"])
def test_fifty_concurrent_identical_requests_make_one_job(database: Database, by: str) -> None:
    store = JobStore(database, _MANY)
    same = {"key": {"idempotency_key": "k"}, "id": {"id": "1" * 32}}[by]
    specs = [make_spec(fingerprint="f", **same) for _ in range(50)]
    answers = at_once([partial(submit, store, spec) for spec in specs])
    assert [answer.is_new for answer in answers].count(True) == 1
    assert len({answer.job.spec.id for answer in answers}) == 1
    assert store.operators.counts() == {"queued": 1}


@on_postgresql
def test_two_concurrent_requests_with_one_key_make_one_job(database: Database) -> None:
    store = JobStore(database, _MANY)
    specs = [make_spec(idempotency_key="k", fingerprint=fingerprint) for fingerprint in "ab" * 10]
    answers = at_once([partial(submit, store, spec) for spec in specs])
    assert sum(isinstance(answer, ConflictError) for answer in answers) == 10
    assert store.operators.counts() == {"queued": 1}


@pytest.mark.parametrize(
    ("limits", "refusal"),
    [({"max_queued": 5}, OverloadedError), ({"max_queued": 100, "max_queued_per_key": 5}, QuotaError)],
)
def test_concurrent_requests_never_exceed_the_queue_limit(
    database: Database, limits: dict[str, int], refusal: type[Exception]
) -> None:
    stores = [JobStore(database, JobSettings(**limits)) for _ in range(30)]
    answers = at_once([partial(submit, store, make_spec(client="k")) for store in stores])
    assert [type(answer) for answer in answers].count(refusal) == 25
    assert stores[0].operators.counts() == {"queued": 5}


def test_only_one_of_many_concurrent_outcomes_counts(database: Database) -> None:
    store = JobStore(database, _MANY)
    for _ in range(8):
        add(store)
        job = lease(store)
        result = result_of(job)
        ends = at_once(
            [
                partial(store.runners.succeed, job, result),
                partial(store.runners.fail, job, ERROR),
                partial(store.runners.stop, job),
                partial(store.runners.requeue, job, delay_s=60, attempts=1, message="x"),
            ]
        )
        (ended,) = [end for end in ends if end is not None]
        assert find(store, job) == ended
        assert (store.files.find(result.file_id) is not None) == (ended.state == "succeeded")


def test_cancel_ends_a_waiting_job_or_reaches_a_started_one(database: Database) -> None:
    store = JobStore(database, _MANY)
    for _ in range(8):
        job = add(store)
        leased, (outcome, _) = at_once(
            [partial(store.runners.lease, "me", lease_s=60), partial(store.clients.cancel, job.spec.ref)]
        )
        if outcome == "removed":
            assert leased is None
            assert find(store, job).state == "cancelled"
        else:
            assert outcome == "requested"
            renewed = store.runners.renew("me", lease_s=60, refs=[job.spec.ref])
            assert [held.cancel_requested for held in renewed] == [True]
            store.runners.stop(leased)


@on_postgresql
def test_dead_letter_is_retried_or_deleted_but_never_both(database: Database) -> None:
    store = JobStore(database, _MANY)
    for _ in range(8):
        add(store)
        job = lease(store)
        store.runners.fail(job, ERROR, is_dead_letter=True)
        retry, purge = partial(store.dead_letters.retry_job, job.spec.ref), partial(store.retention.purge, age_s=0)
        retried, _ = at_once([retry, purge])
        found = store.clients.get(job.spec.ref)
        assert (None if found is None else found.state) == ("queued" if retried else None)
        store.clients.cancel(job.spec.ref)


@on_postgresql
def test_every_job_ends_once_with_faulty_runners(store_url: str, wall: Wall) -> None:
    """Runners end each job twice, sometimes after the lease has expired and the job was put back into the queue."""
    num_jobs = 30
    database = open_database(store_url, wall)
    store = JobStore(database, _MANY)
    for _ in range(num_jobs):
        add(store)
    lost: list[Job] = []

    def work(owner: str) -> None:
        chance = random.Random(owner)
        while store.operators.counts().get("succeeded", 0) < num_jobs:
            job = store.runners.lease(owner, lease_s=LEASE_S)
            if job is None:
                continue
            if chance.random() < 0.3:  # let the leases of all owners expire
                wall.now += LEASE_S
                lost.extend(store.runners.reclaim(max_attempts=1000))
            for _ in range(2):
                store.runners.succeed(job, result_of(job))

    at_once([partial(work, owner) for owner in "abcd"])
    assert store.operators.counts() == {"succeeded": num_jobs}
    assert lost
    database.close()
