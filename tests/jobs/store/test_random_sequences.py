"""Random sequences of operations on the job store have the results that a reference model in plain Python expects.

Hypothesis draws the sequences and shrinks those that fail.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.core.errors import ConflictError, OverloadedError, QuotaError
from stable_audio_serve.core.generation import Priority
from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs.job import Job, JobRef, JobSpec, JobUpload
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.outbox import Outbox
from stable_audio_serve.jobs.store.tables import IDENTITY, METADATA
from tests.jobs.conftest import make_spec
from tests.jobs.stores import ERROR, Wall, open_database, postgres_with_tables, report, result_of, store_url, submit

__all__ = ["postgres_with_tables", "store_url"]

_CHAOS_SEQUENCES = int(os.environ.get("CHAOS_STORE_SEQUENCES", "2000"))
_LIMITS = JobSettings(max_queued=5, max_queued_per_key=3)
_LEASE_S = 10.0
_MAX_ATTEMPTS = 3
_AGE_S = 50.0

_OVER = ("succeeded", "failed", "cancelled")
_Line = tuple[str, str, str]  # (priority, model, client): jobs with the same values form one queue


@dataclass
class Expected:
    """The state of one job that the reference model expects."""

    spec: JobSpec
    number: int  # counts the jobs in order of arrival
    created_at: float
    not_before: float
    start_before: float | None
    state: str = "queued"
    owner: str | None = None
    fence: int = 0
    lease_until: float = 0.0
    attempts: int = 0
    cancel_requested: bool = False
    is_dead_letter: bool = False
    error: str | None = None
    completed_at: float | None = None
    is_notified: bool = False

    @property
    def line(self) -> _Line:
        return (self.spec.request.priority, self.spec.model, self.spec.client)

    def end(self, state: str, now: float, error: str | None = None) -> None:
        self.state, self.completed_at, self.error = state, now, error
        self.owner = self.start_before = None

    def wait(self) -> None:
        self.state, self.owner = "queued", None

    def view(self) -> tuple[object, ...]:
        lease = None if self.owner is None else (self.owner, self.fence)
        flags = (self.cancel_requested, self.is_dead_letter)
        return (self.state, self.attempts, lease, flags, self.error, self.state == "succeeded")


def view(job: Job) -> tuple[object, ...]:
    """Return the fields of a stored job that the reference model predicts, to compare with `Expected.view`."""
    lease = None if job.lease is None else (job.lease.owner, job.lease.fence)
    flags = (job.cancel_requested, job.is_dead_letter)
    error = None if job.error is None else job.error.code
    return (job.state, job.attempts, lease, flags, error, job.result is not None)


_owners = st.sampled_from("ab")
_priorities = st.sampled_from(["interactive", "interactive", "batch"])
_recent = st.sampled_from([0, 0, 0, 1, 1, 2, 3])  # which job to pick: 0 is the newest, 1 the one before

_ends = st.sampled_from(
    ["succeed", "fail", "give up", "stop", "put back", "put back uncounted", "put back after its start"]
)


class StoreMachine(RuleBasedStateMachine):
    """The operations that Hypothesis combines. Two stores on one database act as two server processes."""

    def __init__(self, databases: tuple[Database, Database], wall: Wall) -> None:
        super().__init__()
        self.wall = wall
        self.stores = [JobStore(database, _LIMITS) for database in databases]
        with databases[0].writing() as connection:
            for table in reversed(METADATA.sorted_tables):
                if table is not IDENTITY:
                    connection.execute(sa.delete(table))
        self.turn_of_store = 0
        self.jobs: dict[JobRef, Expected] = {}
        self.ends: dict[JobRef, Job] = {}  # each ended job as it was first read after its end; it must not change
        self.files: dict[str, JobRef | None] = {}  # id of every result's file -> its job; None if it must not exist
        self.num_jobs = 0
        self.turns: dict[_Line, int] = {}  # line -> number of its last start; the starts of a priority are numbered
        self.leases: list[Job] = []  # for every lease so far, the job as it was leased

    @property
    def store(self) -> JobStore:
        self.turn_of_store += 1
        return self.stores[self.turn_of_store % 2]

    @property
    def now(self) -> float:
        return self.wall.now

    def pick(self, back: int) -> Expected:
        return list(self.jobs.values())[-1 - back % len(self.jobs)]

    def pick_lease(self, back: int) -> tuple[Job, Expected | None]:
        """Return the job of a recent lease and, if the lease is still valid, the expected state of the job."""
        leased = self.leases[-1 - back % len(self.leases)]
        return leased, self.held(leased)

    def held(self, job: Job) -> Expected | None:
        """Return the expected state of a leased job if its lease is still valid, otherwise None."""
        expected = self.jobs.get(job.spec.ref)
        lease = job.lease
        if expected is None or expected.state != "running" or lease is None:
            return None
        return expected if (lease.owner, lease.fence) == (expected.owner, expected.fence) else None

    # Clients

    @initialize(model=st.sampled_from("mn"), num_leased=st.integers(0, 2), has_webhook=st.booleans())
    def begin(self, model: str, num_leased: int, has_webhook: bool) -> None:
        for _ in range(3):
            self.submit(model=model, has_webhook=has_webhook)
        for _ in range(num_leased):
            self.lease("a", None)

    @rule(
        model=st.sampled_from("mn"),
        client=st.sampled_from(["", "k", "l"]),
        priority=st.sampled_from(["interactive", "batch"]),
        start_within_s=st.sampled_from([None, None, 0.5, 5.0]),
        has_webhook=st.booleans(),
    )
    def submit_new(
        self, model: str, client: str, priority: str, start_within_s: float | None, has_webhook: bool
    ) -> None:
        self.submit(
            model=model, client=client, priority=priority, start_within_s=start_within_s, has_webhook=has_webhook
        )

    @rule(
        contract=st.sampled_from(["sa3", "sa3", "sa3", "fal"]),
        client=st.sampled_from(["k", "k", "k", "l", ""]),
        own_id=st.sampled_from([None, "1", "2"]),
        key=st.sampled_from([None, "x", "y"]),
        fingerprint=st.sampled_from(["f", "f", "f", "g", ""]),
    )
    def submit_again(self, contract: str, client: str, own_id: str | None, key: str | None, fingerprint: str) -> None:
        self.submit(contract=contract, client=client, own_id=own_id, key=key, fingerprint=fingerprint)

    def submit(
        self,
        *,
        contract: str = "sa3",
        client: str = "",
        own_id: str | None = None,
        key: str | None = None,
        fingerprint: str = "",
        model: str = "m",
        priority: str = "interactive",
        start_within_s: float | None = None,
        has_webhook: bool = False,
    ) -> None:
        self.num_jobs += 1
        upload = StoredFile(f"uploads/{self.num_jobs}", "audio/wav", "a.wav", 1, "0" * 64)
        spec = make_spec(
            contract=contract,
            client=client,
            idempotency_key=key,
            fingerprint=fingerprint,
            model=model,
            priority=priority,
            start_within_s=start_within_s,
            id=own_id or f"new-{self.num_jobs}",
            upload=JobUpload(upload, "init", 1.0),
            webhook_url="https://a.example" if has_webhook else None,
        )
        same_key = [
            job
            for job in self.jobs.values()
            if key is not None
            and (job.spec.contract, job.spec.client, job.spec.idempotency_key) == (contract, client, key)
        ]
        same_id = [self.jobs[spec.ref]] if spec.ref in self.jobs else []
        earlier = same_key + same_id
        queued = [job.spec.client for job in self.jobs.values() if job.state == "queued"]
        if earlier:
            is_repeat = fingerprint and all(job.spec.fingerprint == fingerprint for job in earlier)
            if is_repeat and all(job is earlier[0] for job in earlier):
                added = submit(self.store, spec)
                assert not added.is_new
                assert added.job.spec == earlier[0].spec
            else:
                with pytest.raises(ConflictError):
                    submit(self.store, spec)
        elif self.is_full_for(client, queued):
            with pytest.raises(OverloadedError) as caught:
                submit(self.store, spec)
            assert not isinstance(caught.value, QuotaError)
        elif client and queued.count(client) >= _LIMITS.max_queued_per_key:
            with pytest.raises(QuotaError):
                submit(self.store, spec)
        else:
            added = submit(self.store, spec)
            assert added.is_new
            start_before = None if start_within_s is None else self.now + start_within_s
            self.jobs[spec.ref] = job = Expected(spec, self.num_jobs, self.now, self.now, start_before)
            self.turns.setdefault(job.line, 0)

    def is_full_for(self, client: str, queued: list[str]) -> bool:
        if len(queued) < _LIMITS.max_queued:
            return False
        share = _LIMITS.max_queued / len({*queued, client})
        return not client or queued.count(client) >= share or len(queued) >= 2 * _LIMITS.max_queued

    @precondition(lambda self: self.jobs)
    @rule(back=_recent, is_running=st.booleans())
    def cancel(self, back: int, is_running: bool) -> None:
        held = self.pick_lease(back)[1] if is_running and self.leases else None
        self.cancel_job(held or self.pick(back))

    def cancel_job(self, job: Expected) -> None:
        outcome, found = self.store.clients.cancel(job.spec.ref)
        assert found is not None
        if job.state == "queued":
            assert outcome == "removed"
            job.end("cancelled", self.now, "cancelled")
        elif job.state == "running":
            assert outcome == "requested"
            job.cancel_requested = True
        else:
            assert outcome == "already_over"

    @rule(seconds=st.sampled_from([0.5, 3.0, 31.0]))
    def wait(self, seconds: float) -> None:
        self.wall.now += seconds

    # Runners

    @rule(owner=_owners, models=st.sampled_from([None, ["m"], ["n"], ["m", "n"]]), priority=_priorities)
    def lease_of(self, owner: str, models: list[str] | None, priority: Priority) -> None:
        self.lease(owner, models, priority)

    @rule(owner=_owners, how=_ends, priority=_priorities)
    def run(self, owner: str, how: str, priority: Priority) -> None:
        self.lease(owner, None, priority)
        if self.leases:
            self.finish(0, how)

    @rule(owner=_owners, how=_ends)
    def lose(self, owner: str, how: str) -> None:
        """A runner's lease expires and another runner leases the job. Then the first runner tries to end the job."""
        self.lease(owner, None)
        self.reclaim(_LEASE_S)
        num_leases = len(self.leases)
        self.lease("a", None)
        if num_leases:
            self.finish(len(self.leases) - num_leases, how)

    def lease(self, owner: str, models: list[str] | None, priority: Priority = "interactive") -> None:
        due = [
            job
            for job in self.jobs.values()
            if job.state == "queued"
            and job.not_before <= self.now
            and (job.start_before is None or job.start_before > self.now)
            and (models is None or job.spec.model in models)
            and job.spec.request.priority == priority
        ]
        leased = self.store.runners.lease(owner, lease_s=_LEASE_S, models=models, priority=priority)
        if not due:
            assert leased is None
            return
        job = take_turn(due, self.turns)
        assert leased is not None
        assert leased.spec == job.spec
        job.state, job.owner, job.fence, job.attempts = "running", owner, job.fence + 1, job.attempts + 1
        job.lease_until, job.start_before = self.now + _LEASE_S, None
        assert leased.lease is not None
        assert leased.lease.fence == job.fence
        self.leases.append(leased)

    @rule(owner=_owners)
    def renew(self, owner: str) -> None:
        mine = [job for job in self.jobs.values() if job.owner == owner]
        renewed = self.store.runners.renew(owner, lease_s=_LEASE_S, refs={job.spec.ref for job in self.jobs.values()})
        held = {(one.ref, one.fence, one.cancel_requested) for one in renewed}
        assert held == {(job.spec.ref, job.fence, job.cancel_requested) for job in mine}
        for job in mine:
            job.lease_until = self.now + _LEASE_S

    @rule(seconds=st.sampled_from([0.0, _LEASE_S, _LEASE_S + 1]))
    def reclaim(self, seconds: float) -> None:
        self.wall.now += seconds
        lost = [job for job in self.jobs.values() if job.state == "running" and job.lease_until <= self.now]
        reclaimed = self.store.runners.reclaim(max_attempts=_MAX_ATTEMPTS)
        assert {job.spec.id for job in reclaimed} == {job.spec.id for job in lost}
        for job in lost:
            if job.cancel_requested:
                job.end("cancelled", self.now, "cancelled")
            elif job.attempts >= _MAX_ATTEMPTS:
                job.end("failed", self.now, "unavailable")
                job.is_dead_letter = True
            else:
                job.wait()

    @precondition(lambda self: self.leases)
    @rule(back=_recent, how=_ends)
    def end(self, back: int, how: str) -> None:
        self.finish(back, how)

    def finish(self, back: int, how: str) -> None:
        """A runner ends a job in the way `how`. The store must refuse this if the lease is not valid any more."""
        leased, job = self.pick_lease(back)
        is_held = job is not None
        assert report(self.store, leased, stage="generating", fraction=0.5, eta_s=1.0) == is_held
        match how:
            case "succeed":
                self.succeed(leased, job)
            case "fail" | "give up":
                is_dead_letter = how == "give up"
                assert (self.store.runners.fail(leased, ERROR, is_dead_letter=is_dead_letter) is not None) == is_held
                if job is not None:
                    job.end("failed", self.now, ERROR.code)
                    job.is_dead_letter = is_dead_letter
            case "stop":
                assert (self.store.runners.stop(leased) is not None) == is_held
                if job is not None:
                    job.end("cancelled", self.now, "cancelled")
            case "put back":
                self.put_back(leased, job, attempts=leased.attempts, delay_s=0.0, has_started=False)
            case "put back uncounted":
                self.put_back(leased, job, attempts=leased.attempts - 1, delay_s=5.0, has_started=False)
            case "put back after its start":
                self.put_back(leased, job, attempts=leased.attempts - 1, delay_s=0.0, has_started=True)

    def succeed(self, leased: Job, job: Expected | None) -> None:
        result = result_of(leased)
        result = replace(result, file_id=f"{result.file_id}-{leased.created_at}")
        assert (self.store.runners.succeed(leased, result) is not None) == (job is not None)
        self.files.setdefault(result.file_id, None)
        if job is not None:
            job.end("succeeded", self.now)
            self.files[result.file_id] = leased.spec.ref

    def put_back(self, leased: Job, job: Expected | None, *, attempts: int, delay_s: float, has_started: bool) -> None:
        put_back = self.store.runners.requeue(
            leased, delay_s=delay_s, attempts=attempts, message="x", has_started=has_started
        )
        assert (put_back is not None) == (job is not None)
        if job is None:
            return
        if job.cancel_requested:
            job.end("cancelled", self.now, "cancelled")
            return
        job.wait()
        job.attempts, job.not_before = attempts, self.now + delay_s
        within_s = job.spec.start_within_s
        job.start_before = None if attempts or has_started or within_s is None else job.created_at + within_s

    @rule()
    def expire(self) -> None:
        late = [
            job
            for job in self.jobs.values()
            if job.state == "queued" and job.start_before is not None and job.start_before <= self.now
        ]
        assert {job.spec.id for job in self.store.runners.expire()} == {job.spec.id for job in late}
        for job in late:
            job.end("failed", self.now, "start_timeout")

    # Operators, the sweeper and webhooks

    @precondition(lambda self: self.jobs)
    @rule(back=_recent)
    def retry(self, back: int) -> None:
        dead = [job for job in self.jobs.values() if job.is_dead_letter]
        job = dead[0] if dead else self.pick(back)
        retried = self.store.dead_letters.retry_job(job.spec.ref)
        assert (retried is not None) == job.is_dead_letter
        if job.is_dead_letter:
            job.wait()
            job.attempts, job.not_before, job.completed_at, job.error = 0, self.now, None, None
            job.is_dead_letter = job.cancel_requested = job.is_notified = False
            self.ends.pop(job.spec.ref, None)

    @rule(limit=st.sampled_from([1, 100]), seconds=st.sampled_from([0.0, _AGE_S]))
    def purge(self, limit: int, seconds: float) -> None:
        self.wall.now += seconds
        old = {
            key: job
            for key, job in self.jobs.items()
            if job.completed_at is not None and job.completed_at <= self.now - _AGE_S
        }
        keys: list[str] = []
        while some := self.store.retention.purge(age_s=_AGE_S, limit=limit):
            keys += some
        results = [self.ends[key].result for key in old if key in self.ends]
        files = {result.file.key for result in results if result is not None}
        uploads = {job.spec.upload.file.key for job in old.values() if job.spec.upload is not None}
        assert sorted(keys) == sorted(files | uploads)
        for key in old:
            del self.jobs[key]
            self.ends.pop(key, None)
        for file_id, owner in self.files.items():
            if owner in old:
                self.files[file_id] = None  # no file has this id until a new job makes one

    @rule()
    def deliver(self) -> None:
        outbox = Outbox(self.store.database)
        due = [job for job in self.jobs.values() if job.completed_at is not None and job.spec.webhook_url]
        due = [job for job in due if not job.is_notified]
        delivered = []
        while notice := outbox.claim(for_s=10):
            delivered.append(notice.job.spec.id)
            outbox.remove(notice)
        assert sorted(delivered) == sorted(job.spec.id for job in due)
        for job in due:
            job.is_notified = True

    # Invariants

    @invariant()
    def everything_is_as_expected(self) -> None:
        stored = {job.spec.ref: job for job in self.store.operators.list_all(limit=1000)}
        assert {key: view(job) for key, job in stored.items()} == {key: job.view() for key, job in self.jobs.items()}
        for key, job in stored.items():
            if job.is_over:
                assert self.ends.setdefault(key, job) == job, "an end is final"
            assert job.attempts <= self.jobs[key].fence

    def teardown(self) -> None:
        for job in self.jobs.values():
            events = self.store.clients.events(job.spec.ref)
            assert [event.id for event in events] == sorted({event.id for event in events})
            assert [event.message for event in events].count("started") == job.fence
        for file_id, owner in self.files.items():
            is_kept = owner in self.jobs and self.jobs[owner].state == "succeeded"
            assert (self.store.files.find(file_id) is not None) == is_kept
        uploads = {f"uploads/{number + 1}" for number in range(self.num_jobs)}
        needed = {
            job.spec.upload.file.key
            for job in self.jobs.values()
            if job.spec.upload is not None and (job.completed_at is None or job.is_dead_letter)
        }
        assert set(self.store.retention.unreferenced(sorted(uploads))) == uploads - needed
        queued = [job for job in self.jobs.values() if job.state == "queued"]
        for line in {job.line[:2] for job in queued}:
            waiting, turns = [job for job in queued if job.line[:2] == line], dict(self.turns)
            for position in range(len(waiting)):
                job = take_turn(waiting, turns)
                waiting.remove(job)
                found = self.store.clients.get(job.spec.ref)
                assert found is not None
                assert self.store.clients.position(found) == position


def take_turn(due: list[Expected], turns: dict[_Line, int]) -> Expected:
    """Return the job of `due` that should start next, and record its start in `turns`.

    This is the oldest due job of the line whose last start is longest ago.
    """
    lines = [line for line in turns if any(job.line == line for job in due)]
    line = min(lines, key=lambda line: turns[line])
    turns[line] = 1 + max(number for other, number in turns.items() if other[0] == line[0])
    return min((job for job in due if job.line == line), key=lambda job: job.number)


@pytest.fixture
def databases(store_url: str) -> Iterator[tuple[tuple[Database, Database], Wall]]:
    wall = Wall()
    pair = (open_database(store_url, wall), open_database(store_url, wall))
    yield pair, wall
    for database in pair:
        database.close()


@pytest.mark.server
def test_short_sequences_match_the_model(databases: tuple[tuple[Database, Database], Wall]) -> None:
    run_sequences(databases, count=20, steps=25)


@pytest.mark.slow
def test_many_sequences_match_the_model(databases: tuple[tuple[Database, Database], Wall]) -> None:
    run_sequences(databases, count=200, steps=25)


@pytest.mark.chaos
@pytest.mark.timeout(300 + 20 * _CHAOS_SEQUENCES)
def test_long_sequences_match_the_model(databases: tuple[tuple[Database, Database], Wall]) -> None:
    run_sequences(databases, count=_CHAOS_SEQUENCES, steps=50)


def run_sequences(databases: tuple[tuple[Database, Database], Wall], *, count: int, steps: int) -> None:
    run_state_machine_as_test(
        lambda: StoreMachine(*databases),
        settings=settings(
            max_examples=count, stateful_step_count=steps, suppress_health_check=list(HealthCheck), print_blob=True
        ),
    )
