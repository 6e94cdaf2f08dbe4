"""What every job store must do, whatever database is behind it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.core.errors import ConfigError, OverloadedError, StorageError
from stable_audio_serve.jobs.database import Database, database_url
from stable_audio_serve.jobs.job import Job, JobError, JobResult, JobSpec
from stable_audio_serve.jobs.outbox import Outbox
from stable_audio_serve.jobs.store import JobStore
from tests.jobs.conftest import make_spec

FILE = StoredFile("k-a.wav", "audio/wav", "a.wav", 3, "0" * 64)
RESULT = JobResult(FILE, "f" * 32, 44100, 1, (7,), 1.5)
ERROR = JobError("invalid", "steps: too many", "steps")


@dataclass
class Wall:
    """A clock that stands still until it is moved."""

    now: float = 1_790_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def wall() -> Wall:
    return Wall()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(database_url(None, tmp_path / "jobs"))
    yield database
    database.close()


@pytest.fixture
def store(database: Database, wall: Wall) -> JobStore:
    return JobStore(database, max_queued=50, now=wall)


def find(store: JobStore, job: Job) -> Job:
    found = store.get(job.spec.contract, job.spec.id)
    assert found is not None
    return found


def claim(store: JobStore, owner: str = "me") -> Job:
    job = store.claim(owner)
    assert job is not None
    return job


def claimed_ids(store: JobStore, number: int) -> list[str]:
    return [claim(store).spec.id for _ in range(number)]


def test_a_new_job_waits_and_can_be_found_under_its_contract_only(store: JobStore, wall: Wall) -> None:
    job = store.add(make_spec(contract="fal"))
    assert find(store, job) == job
    assert (job.state, job.stage, job.fraction, job.attempts, job.cancel_requested) == ("queued", "queued", 0, 0, False)
    assert (job.started_at, job.completed_at, job.result, job.error) == (None, None, None, None)
    assert job.created_at.timestamp() == wall.now
    assert [line.message for line in job.logs] == ["queued"]
    assert store.get("sa3", job.spec.id) is None
    assert store.get("fal", "other") is None


def test_the_same_id_under_two_contracts_is_two_jobs(store: JobStore) -> None:
    for contract in ("sa3", "aiml"):
        store.add(make_spec(id="same", contract=contract))
    store.cancel("aiml", "same")
    assert [store.get(contract, "same").state for contract in ("sa3", "aiml")] == ["queued", "cancelled"]  # type: ignore[union-attr]
    with pytest.raises(StorageError):
        store.add(make_spec(id="same", contract="sa3"))


def test_jobs_start_in_order_of_priority_then_arrival(store: JobStore) -> None:
    jobs = [store.add(make_spec(priority=priority)) for priority in ("batch", "interactive", "batch", "interactive")]
    assert [store.position(job) for job in jobs] == [2, 0, 3, 1]
    assert claimed_ids(store, 4) == [jobs[index].spec.id for index in (1, 3, 0, 2)]
    assert store.claim("me") is None


def test_a_claim_says_when_and_how_often(store: JobStore, wall: Wall) -> None:
    store.add(make_spec())
    wall.now += 5
    job = claim(store)
    assert (job.state, job.attempts) == ("running", 1)
    assert job.started_at is not None
    assert job.started_at.timestamp() == wall.now
    assert (job.logs[-1].message, job.logs[-1].at.timestamp()) == ("started", wall.now)


def test_two_claims_at_once_never_get_the_same_job(store: JobStore) -> None:
    for _ in range(40):
        store.add(make_spec())
    barrier = threading.Barrier(4)

    def claim_all(owner: str) -> list[str]:
        barrier.wait()
        ids = []
        while job := store.claim(owner):
            ids.append(job.spec.id)
        return ids

    with ThreadPoolExecutor(4) as pool:
        ids = list(itertools.chain(*pool.map(claim_all, "abcd")))
    assert len(ids) == len(set(ids)) == 40


def test_more_than_may_wait_are_refused(database: Database, wall: Wall) -> None:
    store = JobStore(database, max_queued=2, now=wall)
    store.add(make_spec())
    store.add(make_spec())
    with pytest.raises(OverloadedError) as caught:
        store.add(make_spec())
    assert caught.value.retry_after_s
    claim(store)
    store.add(make_spec())


def test_many_at_once_never_exceed_what_may_wait(database: Database, wall: Wall) -> None:
    store = JobStore(database, max_queued=5, now=wall)

    def add(_: int) -> bool:
        try:
            store.add(make_spec())
        except OverloadedError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(add, range(20))) == 5
    assert store.look("me").num_queued == 5


def test_progress_is_noted_for_the_owner_only(store: JobStore) -> None:
    store.add(make_spec())
    job = claim(store)
    assert store.report(job, "me", stage="generating", fraction=0.5, message="half")
    assert not store.report(job, "other", stage="x", fraction=0.9, message="x")
    now = find(store, job)
    assert (now.stage, now.fraction, now.logs[-1].message) == ("generating", 0.5, "half")


def test_success_keeps_the_result_and_publishes_its_file(store: JobStore, wall: Wall) -> None:
    store.add(make_spec())
    job = claim(store)
    wall.now += 3
    ended = store.succeed(job, "me", RESULT)
    assert ended is not None
    assert ended == find(store, job)
    assert (ended.state, ended.result, ended.error, ended.fraction, ended.stage) == (
        *("succeeded", RESULT, None, 1.0),
        "done",
    )
    assert ended.completed_at is not None
    assert ended.completed_at.timestamp() == wall.now
    assert store.find_file(RESULT.file_id) == FILE
    assert store.find_file("other") is None


def test_failure_keeps_the_error(store: JobStore) -> None:
    store.add(make_spec())
    ended = store.fail(claim(store), "me", ERROR)
    assert ended is not None
    assert (ended.state, ended.error, ended.result) == ("failed", ERROR, None)
    assert ended.logs[-1].message == ERROR.message


def end_in_every_way(store: JobStore, job: Job, owner: str) -> list[Job | None]:
    return [
        store.succeed(job, owner, RESULT),
        store.fail(job, owner, ERROR),
        store.stop(job, owner),
        store.requeue(job, owner, delay_s=0, attempts=0, message="x"),
    ]


@pytest.mark.parametrize("way", range(3))
def test_an_end_is_final(store: JobStore, way: int) -> None:
    store.add(make_spec())
    job = claim(store)
    ends = (
        lambda: store.succeed(job, "me", RESULT),
        lambda: store.fail(job, "me", ERROR),
        lambda: store.stop(job, "me"),
    )
    ended = ends[way]()
    assert end_in_every_way(store, job, "me") == [None] * 4
    assert store.cancel("sa3", job.spec.id) == ("already_over", ended)
    assert store.claim("me") is None
    assert find(store, job) == ended


def test_only_the_owner_may_end_a_job(store: JobStore) -> None:
    waiting = store.add(make_spec())
    assert end_in_every_way(store, waiting, "me") == [None] * 4
    job = claim(store)
    assert end_in_every_way(store, job, "other") == [None] * 4
    assert store.find_file(RESULT.file_id) is None
    assert find(store, job).state == "running"


def test_a_waiting_job_is_cancelled_at_once(store: JobStore) -> None:
    job = store.add(make_spec())
    outcome, ended = store.cancel("sa3", job.spec.id)
    assert outcome == "removed"
    assert ended is not None
    assert (ended.state, ended.started_at) == ("cancelled", None)
    assert ended.error is not None
    assert ended.error.code == "cancelled"
    assert store.claim("me") is None
    assert store.cancel("sa3", job.spec.id)[0] == "already_over"


def test_a_running_job_is_asked_to_stop(store: JobStore) -> None:
    store.add(make_spec())
    job = claim(store)
    assert store.cancellations("me") == []
    assert store.cancel("sa3", job.spec.id)[0] == "requested"
    assert store.cancellations("me") == [("sa3", job.spec.id)]
    assert store.cancellations("other") == []
    assert find(store, job).cancel_requested
    ended = store.stop(job, "me")
    assert ended is not None
    assert ended.state == "cancelled"
    assert store.cancellations("me") == []


def test_an_unknown_job_cannot_be_cancelled(store: JobStore) -> None:
    assert store.cancel("sa3", "other") == ("unknown", None)


def test_a_job_put_back_waits_its_delay_and_keeps_its_turn(store: JobStore, wall: Wall) -> None:
    first, second = store.add(make_spec()), store.add(make_spec())
    job = claim(store)
    put_back = store.requeue(job, "me", delay_s=10, attempts=1, message="put back: busy")
    assert put_back is not None
    assert (put_back.state, put_back.attempts, put_back.started_at) == ("queued", 1, None)
    assert put_back.logs[-1].message == "put back: busy"
    assert claimed_ids(store, 1) == [second.spec.id]
    assert store.claim("me") is None
    assert store.look("me").claim_in_s == pytest.approx(10)
    wall.now += 10.5
    again = claim(store)
    assert (again.spec.id, again.attempts) == (first.spec.id, 2)


def test_a_late_job_fails_instead_of_starting(store: JobStore, wall: Wall) -> None:
    late, patient = store.add(make_spec(start_within_s=5.0)), store.add(make_spec(start_within_s=60.0))
    assert store.look("me").late_in_s == pytest.approx(5)
    assert store.expire() == []
    wall.now += 5.5
    (ended,) = store.expire()
    assert ended.spec.id == late.spec.id
    assert ended.state == "failed"
    assert ended.error is not None
    assert ended.error.code == "start_timeout"
    assert claimed_ids(store, 1) == [patient.spec.id]


def test_a_late_job_is_not_claimed_even_before_it_is_found_late(store: JobStore, wall: Wall) -> None:
    store.add(make_spec(start_within_s=5.0))
    wall.now += 5.5
    assert store.claim("me") is None


def test_a_job_that_began_in_time_is_never_late(store: JobStore, wall: Wall) -> None:
    store.add(make_spec(start_within_s=5.0))
    job = claim(store)
    wall.now += 60
    assert store.expire() == []
    store.requeue(job, "me", delay_s=0, attempts=1, message="x")
    assert store.expire() == []
    assert claim(store).attempts == 2


def test_a_job_whose_start_did_not_count_can_still_be_late(store: JobStore, wall: Wall) -> None:
    store.add(make_spec(start_within_s=5.0))
    store.requeue(claim(store), "me", delay_s=0, attempts=0, message="busy")
    wall.now += 6
    assert len(store.expire()) == 1


def test_a_new_owner_takes_over_what_the_old_one_left(store: JobStore) -> None:
    store.add(make_spec())
    store.add(make_spec())
    job = claim(store, "old")
    (adopted,) = store.adopt("new")
    assert (adopted.spec.id, adopted.state, adopted.attempts) == (job.spec.id, "running", 1)
    assert end_in_every_way(store, job, "old") == [None] * 4
    assert not store.report(job, "old", stage="x", fraction=0.9, message="x")
    assert store.adopt("new") == []
    assert store.succeed(job, "new", RESULT) is not None


def test_jobs_survive_the_end_of_the_process(store: JobStore, database: Database) -> None:
    waiting, running = store.add(make_spec()), store.add(make_spec())
    claim(store)
    database.close()
    again = JobStore(Database(str(database.engine.url)))
    assert again.get("sa3", waiting.spec.id) == find(store, waiting)
    assert again.get("sa3", running.spec.id) == find(store, running)
    again.database.close()


def test_an_idle_look_sees_nothing_to_do(store: JobStore) -> None:
    outlook = store.look("me")
    assert (outlook.num_queued, outlook.num_stops) == (0, 0)
    assert (outlook.claim_in_s, outlook.late_in_s, outlook.webhook_in_s) == (None, None, None)


def test_an_end_is_to_be_told_until_it_is_settled(store: JobStore, database: Database, wall: Wall) -> None:
    outbox = Outbox(database, now=wall)
    store.add(make_spec())
    store.add(make_spec(webhook_url="https://a.example/1"))
    for _ in range(2):
        store.succeed(claim(store), "me", JobResult(FILE, f"{_}", 44100, 1, (7,), 1.5))
    (notice,) = outbox.due(limit=10)
    assert (notice.url, notice.job.state, notice.num_failures) == ("https://a.example/1", "succeeded", 0)
    assert store.look("me").webhook_in_s == pytest.approx(0)
    outbox.postpone(notice, delay_s=7)
    assert outbox.due(limit=10) == []
    assert store.look("me").webhook_in_s == pytest.approx(7)
    wall.now += 7
    (notice,) = outbox.due(limit=10)
    assert notice.num_failures == 1
    outbox.settle(notice)
    assert outbox.due(limit=10) == []
    assert store.look("me").webhook_in_s is None


@pytest.mark.parametrize("end", ["fail", "stop", "cancel", "expire"])
def test_every_kind_of_end_is_told(store: JobStore, database: Database, wall: Wall, end: str) -> None:
    job = store.add(make_spec(webhook_url="https://a.example/", start_within_s=1.0))
    match end:
        case "fail":
            store.fail(claim(store), "me", ERROR)
        case "stop":
            store.stop(claim(store), "me")
        case "cancel":
            store.cancel("sa3", job.spec.id)
        case "expire":
            wall.now += 2
            store.expire()
    (notice,) = Outbox(database, now=wall).due(limit=10)
    assert notice.job == find(store, job)


def test_nothing_is_told_before_the_end(store: JobStore, database: Database, wall: Wall) -> None:
    store.add(make_spec(webhook_url="https://a.example/"))
    job = claim(store)
    store.requeue(job, "me", delay_s=0, attempts=1, message="x")
    assert Outbox(database, now=wall).due(limit=10) == []


def test_a_published_file_is_found_by_an_id_that_cannot_be_guessed(store: JobStore) -> None:
    ids = {store.publish(FILE) for _ in range(3)}
    assert len(ids) == 3
    assert all(len(file_id) == 32 for file_id in ids)
    assert [store.find_file(file_id) for file_id in ids] == [FILE] * 3


def test_nothing_is_touched_before_the_first_use(tmp_path: Path) -> None:
    JobStore(Database(database_url(None, tmp_path / "outputs")))
    assert list(tmp_path.iterdir()) == []


def test_a_database_that_cannot_be_opened_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    store = JobStore(Database(database_url(None, tmp_path / "file")))
    with pytest.raises(StorageError):
        store.add(make_spec())


@pytest.mark.parametrize("url", ["nonsense", "postgresql://u:secret@host/db", "sqlite://", "sqlite:///", "mysql://x/y"])
def test_a_database_that_cannot_be_used_yet_stops_the_start(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="database_url") as caught:
        database_url(url, tmp_path)
    assert "secret" not in caught.value.message


def test_a_configured_sqlite_file_is_used(tmp_path: Path) -> None:
    database = Database(database_url(f"sqlite:///{tmp_path}/mine.db", Path("/nowhere")))
    JobStore(database).add(make_spec())
    database.close()
    assert (tmp_path / "mine.db").is_file()


def test_prompts_with_anything_in_them_survive(store: JobStore) -> None:
    spec: JobSpec = make_spec(wire={"text": "'; DROP TABLE jobs; -- \x00 ♪"})
    assert find(store, store.add(spec)).spec == spec
