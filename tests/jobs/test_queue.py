from __future__ import annotations

import asyncio
import errno
import gc
import sqlite3
import threading
from collections.abc import Sequence
from contextlib import closing

import pytest
import sqlalchemy as sa
import structlog

from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.core.errors import ConflictError, OverloadedError, StorageError, StorageFullError
from stable_audio_serve.core.ids import current_client
from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs import queue as queue_module
from stable_audio_serve.jobs.job import JobRef, JobSpec
from stable_audio_serve.jobs.store.client_jobs import Added
from tests.jobs.conftest import Workshop, make_spec, upload
from tests.jobs.stores import add
from tests.patience import PATIENCE_S, until


@pytest.fixture
def job_settings() -> JobSettings:
    return JobSettings(max_queued=60)


async def test_concurrent_submissions_share_transactions(workshop: Workshop) -> None:
    commits: list[object] = []
    add(workshop.queue.store)
    sa.event.listen(workshop.queue.store.database.engine, "commit", commits.append)
    specs = [make_spec() for _ in range(50)]
    added = await asyncio.gather(*map(workshop.queue.add, specs))
    assert [one.job.spec for one in added] == specs
    assert len(commits) <= 4
    for spec in specs:
        assert await workshop.queue.get(spec.ref) is not None


async def test_each_concurrent_submission_gets_its_own_result(workshop: Workshop) -> None:
    queue = workshop.queue
    first, same, other = (make_spec(idempotency_key="k", fingerprint=print_) for print_ in ("f", "f", "g"))
    many = [make_spec() for _ in range(60)]
    outcomes = await asyncio.gather(*map(queue.add, [first, same, other, *many]), return_exceptions=True)
    assert [getattr(outcome, "is_new", None) for outcome in outcomes[:3]] == [True, False, None]
    assert isinstance(outcomes[2], ConflictError)
    assert outcomes[2].code == "idempotency_key_reused"
    assert [type(outcome) for outcome in outcomes[3:]] == [Added] * 59 + [OverloadedError]
    assert await queue.get(many[-1].ref) is None


async def test_cancelled_submission_affects_no_other(workshop: Workshop) -> None:
    left, stays = make_spec(), make_spec()
    tasks = [asyncio.create_task(workshop.queue.add(spec)) for spec in (left, stays)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    assert (await tasks[1]).is_new
    assert (await asyncio.gather(tasks[0], return_exceptions=True))[0].__class__ is asyncio.CancelledError


async def test_reads_do_not_wait_for_writes_to_a_locked_database(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [await workshop.queue.submit(make_spec()) for _ in range(40)]
    monkeypatch.setattr(queue_module, "_WRITE_TIMEOUT_S", 1.0)
    path = workshop.queue.store.database.engine.url.database
    assert path is not None
    with closing(sqlite3.connect(path, isolation_level=None)) as locking:
        locking.execute("BEGIN IMMEDIATE")
        cancelling = [asyncio.create_task(workshop.queue.cancel(job.spec.ref)) for job in jobs]
        await asyncio.sleep(0.1)
        for job in jobs:
            async with asyncio.timeout(5.0):
                assert await workshop.queue.get(job.spec.ref) is not None
        outcomes = await asyncio.gather(*cancelling, return_exceptions=True)
        locking.execute("ROLLBACK")
    assert {type(outcome) for outcome in outcomes} == {StorageError}
    assert (await workshop.queue.cancel(jobs[-1].spec.ref))[0] == "removed"


async def test_failed_writes_without_a_caller_are_not_logged_as_unhandled(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio would log a traceback for each transaction that fails after its caller has got an error or has left."""
    begun, may_end = threading.Event(), threading.Event()
    logged: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context["message"]))

    def fail() -> None:
        begun.set()
        may_end.wait(PATIENCE_S)
        raise StorageError("the job database failed")

    cancelled = asyncio.create_task(workshop.queue.write(fail))
    await asyncio.to_thread(begun.wait, PATIENCE_S)
    cancelled.cancel()
    with monkeypatch.context() as hurried:
        hurried.setattr(queue_module, "_WRITE_TIMEOUT_S", 0.1)
        with pytest.raises(StorageError, match="does not answer"):
            await workshop.queue.write(fail)
    may_end.set()
    await asyncio.gather(cancelled, return_exceptions=True)
    del cancelled
    await workshop.queue.submit(make_spec())
    gc.collect()
    assert logged == []


async def test_reads_log_with_the_id_of_their_request(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(
        workshop.queue.store.clients, "get", lambda ref: seen.append(structlog.contextvars.get_contextvars())
    )
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        await workshop.queue.get(make_spec().ref)
    assert seen == [{"request_id": "r1"}]


async def test_writes_log_with_the_id_of_a_request_of_their_own(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Concurrent submissions share a transaction. Its log lines have the id of one of these, not of an earlier one."""
    seen: list[object] = []
    add_all, may_end = workshop.queue.store.clients.add_all, threading.Event()

    def note(specs: Sequence[JobSpec]) -> Sequence[Added | Exception]:
        seen.append(structlog.contextvars.get_contextvars())
        may_end.wait()
        return add_all(specs)

    async def submit(request_id: str) -> None:
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            await workshop.queue.add(make_spec())

    monkeypatch.setattr(workshop.queue.store.clients, "add_all", note)
    first = asyncio.create_task(submit("r1"))
    await until(lambda: seen)
    others = [asyncio.create_task(submit(name)) for name in ("r2", "r3")]
    await asyncio.sleep(0)
    may_end.set()
    await asyncio.gather(first, *others)
    monkeypatch.setattr(
        workshop.queue.store.clients, "cancel", lambda ref: (seen.append(structlog.contextvars.get_contextvars()), None)
    )
    with structlog.contextvars.bound_contextvars(request_id="r4"):
        await workshop.queue.cancel(make_spec().ref)
    assert seen == [{"request_id": name} for name in ("r1", "r2", "r4")]


async def test_reads_of_a_database_that_has_stopped_end(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    job = await workshop.queue.submit(make_spec())
    may_answer = threading.Event()
    monkeypatch.setattr(queue_module, "_READ_TIMEOUT_S", 0.05)
    with monkeypatch.context() as stopped:
        stopped.setattr(workshop.queue.store.clients, "get", lambda ref: may_answer.wait())
        for _ in range(20):  # more than there are threads
            with pytest.raises(StorageError, match="does not answer"):
                await workshop.queue.get(job.spec.ref)
    may_answer.set()
    monkeypatch.setattr(queue_module, "_READ_TIMEOUT_S", PATIENCE_S)
    assert await workshop.queue.get(job.spec.ref) is not None


async def test_reads_of_one_client_take_turns(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    may_end = threading.Event()

    def get(ref: JobRef) -> None:
        started.append(current_client.get())
        may_end.wait(PATIENCE_S)

    async def read(client: str) -> None:
        current_client.set(client)
        await workshop.queue.get(make_spec().ref)

    monkeypatch.setattr(workshop.queue.store.clients, "get", get)
    reads = [asyncio.create_task(read(client)) for client in ("greedy", "greedy", "greedy", "other")]
    await until(lambda: "other" in started)
    assert sorted(started) == ["greedy", "other"]
    may_end.set()
    await asyncio.gather(*reads)
    assert started.count("greedy") == 3


async def test_database_error_reaches_every_caller_and_passes(workshop: Workshop) -> None:
    add(workshop.queue.store)
    engine = workshop.queue.store.database.engine

    def fail(connection: sa.Connection) -> None:
        raise sa.exc.OperationalError("", {}, Exception("gone"))

    sa.event.listen(engine, "begin", fail)
    outcomes = await asyncio.gather(*(workshop.queue.add(make_spec()) for _ in range(5)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [StorageError] * 5
    sa.event.remove(engine, "begin", fail)
    assert (await workshop.queue.add(make_spec())).is_new


async def test_files_are_deleted_if_the_database_is_full(workshop: Workshop) -> None:
    """A client that tries again and again would otherwise fill the disk with files that stay for a day."""
    add(workshop.queue.store)
    spec = make_spec(upload=await upload(workshop))

    def fail(connection: sa.Connection) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    sa.event.listen(workshop.queue.store.database.engine, "begin", fail)
    with pytest.raises(StorageFullError):
        await workshop.queue.add(spec)
    with pytest.raises(StorageFullError):
        await workshop.queue.publish(lambda: [b"x"], media_type="audio/wav", file_name="a.wav")
    assert workshop.files() == []


async def test_published_file_stays_if_only_the_answer_is_lost(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = workshop.queue.store.files.publish

    def cut(file: StoredFile, *, file_id: str | None) -> str:
        publish(file, file_id=file_id)
        raise StorageError("the connection was cut after the commit")

    monkeypatch.setattr(workshop.queue.store.files, "publish", cut)
    with pytest.raises(StorageError):
        await workshop.queue.publish(lambda: [b"x"], media_type="audio/wav", file_name="a.wav", file_id="mine")
    found = await workshop.queue.find_file("mine")
    assert found is not None
    assert [chunk async for chunk in workshop.queue.artifacts.read(found)] == [b"x"]
