"""Where jobs are kept: what clients, runners, operators and the sweeper may do with them.

Blocking: call it from worker threads. Knows states, leases and owners, not what jobs do. Runs on SQLite and PostgreSQL.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import sqlalchemy as sa

from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.core.errors import ConflictError, InvalidRequestError, StableAudioError, StorageError
from stable_audio_serve.core.generation import Priority
from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs.job import Contract, Job, JobError, JobEvent, JobRef, JobResult, JobSpec, State, host_of
from stable_audio_serve.jobs.store import codec
from stable_audio_serve.jobs.store.admission import count, find_no_room, find_same
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.retention import forget_some, unreferenced
from stable_audio_serve.jobs.store.tables import EVENTS, FILES, IDENTITY, IS_DEAD, JOBS, in_state
from stable_audio_serve.jobs.store.transitions import (
    CANCELLED,
    Transitions,
    is_held,
    is_job,
    to_event,
    to_job,
    waiting_again,
)
from stable_audio_serve.jobs.store.turns import Turns

CancelOutcome = Literal["removed", "requested", "already_over", "unknown"]

_RETRY_S = 1.0
_LATE = JobError("start_timeout", "the job could not be started in the time its client allowed")
_EXHAUSTED = JobError("unavailable", "the server was interrupted too often during this job")
_ADDING, _LEASING = 0x53415502, 0x53415503  # any numbers of our own
_BATCH = 500  # rows or parameters of one statement
_MAX_ID = 2**63 - 1

_jobs = JOBS.c
_QUEUED, _RUNNING = in_state("queued"), in_state("running")


@dataclass(frozen=True, slots=True)
class Added:
    """A job that is kept now; not new when the same request was kept before."""

    job: Job
    is_new: bool


@dataclass(frozen=True, slots=True)
class Held:
    """A running job whose lease was renewed."""

    ref: JobRef
    fence: int
    cancel_requested: bool


@dataclass(frozen=True, slots=True)
class Report:
    """How far a running job is; `eta_s` is the predicted time to its end, seconds."""

    job: Job
    stage: str
    fraction: float
    eta_s: float | None = None
    engine_position: int | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Some jobs, newest first; `next_cursor` leads to the older ones, if any."""

    jobs: tuple[Job, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a runner may have to do: counts, and seconds until something is due (0 or less: now; None: never)."""

    queued: Mapping[Priority, int]
    num_stops: int
    lease_in_s: float | None
    reclaim_in_s: float | None
    late_in_s: float | None
    webhook_in_s: float | None

    @property
    def num_queued(self) -> int:
        """Of every priority."""
        return sum(self.queued.values())


class JobStore:
    """Jobs by (contract, client, id). An `owner` is one life of one runner; only a lease's holder may change its job.

    Every method raises StorageError when the database cannot be used now.
    """

    def __init__(self, database: Database, limits: JobSettings | None = None) -> None:
        """Touches nothing yet."""
        self.database = database
        self._limits = limits or JobSettings()
        self._do = Transitions(database)
        self._turns = Turns(database)
        self._insert_job = _insert_job(database)

    # What clients do

    def add(self, spec: JobSpec) -> Added:
        """Keep a new job, or find the one that the same request made before.

        Raises ConflictError (`field` is "Idempotency-Key" or "id") when that was another request, QuotaError and
        OverloadedError when too many are waiting.
        """
        (outcome,) = self.add_all([spec])
        if isinstance(outcome, StableAudioError):
            raise outcome
        return outcome

    def add_all(self, specs: Sequence[JobSpec]) -> list[Added | StableAudioError]:
        """`add` for several, in one transaction: what it returns or raises for each of them."""
        with self.database.writing_alone(_ADDING) as connection:  # so that the limits hold, however many add at once
            return [self._add(connection, spec) for spec in specs]

    def get(self, ref: JobRef) -> Job | None:
        """The job as it is now."""
        return self._find(is_job(ref))

    def find_unguessable(self, contract: Contract, job_id: str) -> Job | None:
        """Anybody's job with this id, unless its client chose it: for links that need no key."""
        is_ours = _jobs.id_is_chosen == sa.false()
        return self._find(sa.and_(_jobs.contract == contract, _jobs.id == job_id, is_ours))

    def list_own(
        self, contract: Contract, client: str, *, state: State | None = None, cursor: str | None = None, limit: int = 20
    ) -> Page:
        """One client's jobs, newest first. Raises InvalidRequestError for a cursor that this client was not given."""
        conditions = [_jobs.contract == contract, _jobs.client == client]
        if state is not None:
            conditions.append(_jobs.state == state)
        with self.database.reading() as connection:
            if cursor is not None:  # the last job of the page before
                seq = connection.execute(sa.select(_jobs.seq).where(is_job(JobRef(contract, client, cursor)))).scalar()
                if seq is None:
                    message = "cursor: none that was given to you, or its job is no longer kept"
                    raise InvalidRequestError(message, field="cursor")
                conditions.append(_jobs.seq < seq)
            query = sa.select(JOBS).where(*conditions).order_by(_jobs.seq.desc()).limit(limit + 1)
            rows = connection.execute(query).all()
        jobs = tuple(to_job(row) for row in rows[:limit])
        return Page(jobs, jobs[-1].spec.id if len(rows) > limit else None)

    def events(self, ref: JobRef, *, after: int = 0) -> tuple[JobEvent, ...]:
        """What happened to the job, in order; only what came after the event with the id `after`."""
        query = sa.select(EVENTS).join(JOBS, _jobs.seq == EVENTS.c.job).where(is_job(ref)).order_by(EVENTS.c.id)
        num_known = min(max(after, 0), _MAX_ID)
        with self.database.reading() as connection:
            rows = connection.execute(query.offset(num_known)).all()
        return tuple(to_event(row, number) for number, row in enumerate(rows, start=num_known + 1))

    def position(self, job: Job) -> int:
        """How many waiting jobs of its model and priority start before this one."""
        is_it = is_job(job.spec.ref)
        with self.database.reading() as connection:
            return self._turns.position(connection, job.spec, is_job=is_it)

    def cancel(self, ref: JobRef) -> tuple[CancelOutcome, Job | None]:
        """End a waiting job, or ask the owner of a running one to stop; and the job afterwards."""
        is_it = is_job(ref)
        with self.database.writing() as connection:
            row = connection.execute(sa.select(JOBS).where(is_it).with_for_update()).first()
            if row is None:
                return "unknown", None
            if row.state == "queued":
                values = self._do.ended("cancelled", CANCELLED)
                return "removed", self._do.change(connection, is_it, message="cancelled", **values)
            if row.state != "running":
                return "already_over", to_job(row)
            if row.cancel_requested:
                return "requested", to_job(row)
            asked = self._do.change(connection, is_it, message="cancellation requested", cancel_requested=True)
            return "requested", asked

    def find_file(self, file_id: str) -> StoredFile | None:
        """The published file with this id."""
        with self.database.reading() as connection:
            text = connection.execute(sa.select(FILES.c.file).where(FILES.c.id == file_id)).scalar()
        return None if text is None else codec.load_file(text)

    def publish(self, file: StoredFile, *, file_id: str | None = None) -> str:
        """Give a file an unguessable id of its own, unless it has one. Raises StorageError also for a used id."""
        with self.database.writing() as connection:
            return self._publish(connection, file, file_id=file_id or secrets.token_hex(16))

    # What runners do

    def lease(
        self,
        owner: str,
        *,
        lease_s: float,
        models: Collection[str] | None = None,
        priority: Priority = "interactive",
    ) -> Job | None:
        """Start the waiting job whose turn it is, of these models; it is the owner's for `lease_s` from now."""
        is_next = _jobs.seq == self._turns.next_job(priority, models)
        values = self._do.started(owner, lease_s=lease_s)
        with self.database.writing_alone(_LEASING) as connection:  # who looks meanwhile would give the same turn
            job = self._do.change(connection, is_next, message="started", **values)
            if job is not None:
                self._turns.served(connection, job.spec)
        return job

    def renew(self, owner: str, *, lease_s: float, refs: Collection[JobRef]) -> list[Held]:
        """Hold on to these running jobs of this owner for `lease_s` from now; those that are not returned are lost.

        A lease whose owner never heard that it got it is thus not kept: nobody runs that job.
        """
        is_one = sa.tuple_(_jobs.contract, _jobs.client, _jobs.id).in_(refs)
        change = sa.update(JOBS).where(_jobs.owner == owner, _RUNNING, is_one)
        values = change.values(lease_until=self.database.now + lease_s)
        returning = values.returning(_jobs.contract, _jobs.client, _jobs.id, _jobs.fence, _jobs.cancel_requested)
        with self.database.writing() as connection:
            _lock(connection, {ref.id for ref in refs})
            return [Held(JobRef(*row[:3]), *row[3:]) for row in connection.execute(returning)]

    def reclaim(self, *, max_attempts: int) -> list[Job]:
        """Take every running job whose lease ran out from its owner; the jobs afterwards.

        They wait again, are cancelled if that was asked, or, after `max_attempts`, are dead letters.
        """
        is_asked, is_last = _jobs.cancel_requested, _jobs.attempts >= max_attempts
        dead = self._do.ended("failed", _EXHAUSTED) | {"is_dead_letter": True}
        reclaimed: list[Job] = []
        for condition, message, values in (
            (is_asked, "cancelled", self._do.ended("cancelled", CANCELLED)),
            (is_last, _EXHAUSTED.message, dead),
            (sa.not_(sa.or_(is_asked, is_last)), "put back: its runner was lost", waiting_again()),
        ):
            is_lost = (_RUNNING, _jobs.lease_until <= self.database.now, condition)
            reclaimed += self._change_all(*is_lost, message=message, **values)
        return reclaimed

    def report(self, reports: Collection[Report]) -> list[Job]:
        """Note progress of running jobs; those whose lease is lost."""
        with self.database.writing() as connection:
            _lock(connection, {report.job.spec.id for report in reports})
            return [report.job for report in reports if self._note_progress(connection, report) is None]

    def succeed(self, job: Job, result: JobResult) -> Job | None:
        """End a job with its result, whose file is published by the same commit; None when its lease is lost."""
        values = self._do.ended("succeeded") | {"stage": "done", "fraction": 1.0}
        values |= {"result": codec.dump(result), "result_key": result.file.key}
        with self.database.writing() as connection:
            message = f"finished: the generation took {result.inference_s:.2f} s"
            ended = self._do.change(connection, is_held(job), message=message, **values)
            if ended is not None:
                self._publish(connection, result.file, file_id=result.file_id)
        return ended

    def fail(self, job: Job, error: JobError, *, is_dead_letter: bool = False) -> Job | None:
        """End a job with an error; None when its lease is lost."""
        values = self._do.ended("failed", error) | {"is_dead_letter": is_dead_letter}
        return self._change_held(job, message=error.message, **values)

    def stop(self, job: Job) -> Job | None:
        """End a running job whose cancellation was requested; None when its lease is lost."""
        return self._change_held(job, message="cancelled", **self._do.ended("cancelled", CANCELLED))

    def requeue(self, job: Job, *, delay_s: float, attempts: int, message: str) -> Job | None:
        """Put a running job back to wait `delay_s`, with `attempts` counted; None when its lease is lost.

        It is cancelled instead when that was asked.
        """
        start_within_s = None if attempts else job.spec.start_within_s
        start_before = None if start_within_s is None else job.created_at.timestamp() + start_within_s
        values = waiting_again() | {"attempts": attempts, "start_before": start_before}
        with self.database.writing() as connection:
            asked = sa.select(_jobs.cancel_requested).where(is_held(job)).with_for_update()
            if connection.execute(asked).scalar():
                message, values = "cancelled", self._do.ended("cancelled", CANCELLED)
            not_before = self.database.now + delay_s
            return self._do.change(connection, is_held(job), message=message, **values, not_before=not_before)

    def expire(self) -> list[Job]:
        """End the waiting jobs whose time to start is over."""
        is_late = (_QUEUED, _jobs.start_before <= self.database.now)
        return self._change_all(*is_late, message=_LATE.message, **self._do.ended("failed", _LATE))

    def look(self, owner: str) -> Outlook:
        """What there is to do, in one query: all that an idle runner asks."""
        now = self.database.now
        query = sa.select(
            *(count(_QUEUED, _jobs.priority == priority).label(priority) for priority in get_args(Priority)),
            count(_jobs.owner == owner, _RUNNING, _jobs.cancel_requested).label("stops"),
            (_least(_jobs.not_before, _QUEUED) - now).label("lease"),
            (_least(_jobs.lease_until, _RUNNING) - now).label("reclaim"),
            (_least(_jobs.start_before, _jobs.start_before.is_not(None)) - now).label("late"),
            (_least(_jobs.webhook_at, _jobs.webhook_at.is_not(None)) - now).label("webhook"),
        )
        with self.database.reading() as connection:
            row = connection.execute(query).one()
        queued = {priority: row._mapping[priority] for priority in get_args(Priority)}
        return Outlook(queued, row.stops, row.lease, row.reclaim, row.late, row.webhook)

    # What operators do

    def find_all(self, job_id: str) -> Sequence[Job]:
        """Everybody's jobs with this id, of all contracts."""
        with self.database.reading() as connection:
            rows = connection.execute(sa.select(JOBS).where(_jobs.id == job_id)).all()
        return [to_job(row) for row in sorted(rows, key=lambda row: row.seq)]

    def list_all(self, *, state: State | None = None, dead_letters: bool = False, limit: int = 100) -> Sequence[Job]:
        """Everybody's jobs, newest first."""
        query = sa.select(JOBS).order_by(_jobs.seq.desc()).limit(limit)
        if state is not None:
            query = query.where(_jobs.state == state)
        if dead_letters:
            query = query.where(IS_DEAD)
        with self.database.reading() as connection:
            return [to_job(row) for row in connection.execute(query)]

    def retry(self, ref: JobRef) -> Job | None:
        """Let a dead letter wait again, its attempts forgotten; None when the job is none."""
        values = waiting_again() | {"attempts": 0, "is_dead_letter": False, "error": None, "completed_at": None}
        values |= {"cancel_requested": False, "webhook_at": None, "webhook_attempts": 0, "retries": _jobs.retries + 1}
        is_dead = sa.and_(is_job(ref), _jobs.is_dead_letter)
        with self.database.writing() as connection:
            values["not_before"] = self.database.now
            return self._do.change(connection, is_dead, message="tried again by an operator", **values)

    def counts(self) -> Mapping[State, int]:
        """Jobs by state."""
        query = sa.select(_jobs.state, sa.func.count()).group_by(_jobs.state)
        with self.database.reading() as connection:
            return {state: count for state, count in connection.execute(query)}  # noqa: C416

    # What the sweeper does

    def identity(self) -> str:
        """A random name that this database has and keeps."""
        return self._find_own(IDENTITY.c.id)

    def secret(self) -> str:
        """256 random bits that this database has and keeps, for what its servers sign; for no one else to see."""
        return self._find_own(IDENTITY.c.secret)

    def purge(self, *, age_s: float, limit: int = 100) -> list[str]:
        """Forget jobs that ended, and files published, `age_s` ago and more: some that nothing needs any more, by key.

        Each transaction forgets up to `limit` jobs and files. No keys: nothing is left to forget.
        """
        while True:
            with self.database.writing() as connection:
                num_forgotten, keys = forget_some(connection, before=self.database.now - age_s, limit=limit)
            if keys or not num_forgotten:
                return keys

    def unreferenced(self, keys: Collection[str]) -> list[str]:
        """Those of `keys` that no job and no published file needs."""
        with self.database.reading() as connection:
            return unreferenced(connection, list(keys))

    # Inside

    def _find_own(self, column: sa.Column[Any]) -> str:
        new = {"seq": 1, "id": secrets.token_hex(16), "secret": secrets.token_hex(32)}
        with self.database.writing() as connection:
            connection.execute(self.database.insert(IDENTITY).values(new).on_conflict_do_nothing())
            return str(connection.execute(sa.select(column)).scalar_one())

    def _find(self, condition: sa.ColumnElement[bool]) -> Job | None:
        with self.database.reading() as connection:
            row = connection.execute(sa.select(JOBS).where(condition)).first()
        return None if row is None else to_job(row)

    def _add(self, connection: sa.Connection, spec: JobSpec) -> Added | StableAudioError:
        refusal = find_no_room(connection, spec, limits=self._limits)
        if refusal is None and (row := self._insert(connection, spec)):
            self._turns.join(connection, spec)
            self._do.note(connection, [row], message="queued")
            return Added(to_job(row), is_new=True)
        try:
            earlier = find_same(connection, spec)
        except ConflictError as error:
            return error
        if earlier is not None:
            return Added(to_job(earlier), is_new=False)
        return refusal or StorageError("the job database changes too fast", retry_after_s=0)  # its twin was just purged

    def _insert(self, connection: sa.Connection, spec: JobSpec) -> sa.Row[Any] | None:
        """None when a job with its id or idempotency key is there already."""
        values = {
            **{"contract": spec.contract, "id": spec.id, "client": spec.client, "id_is_chosen": spec.id_is_chosen},
            **{"model": spec.model, "priority": spec.request.priority},
            **{"spec": codec.dump(spec), "fingerprint": spec.fingerprint, "idempotency_key": spec.idempotency_key},
            "start_within_s": spec.start_within_s,
            "upload_key": spec.upload.file.key if spec.upload else None,
            "webhook_url": spec.webhook_url,
            "webhook_host": host_of(spec.webhook_url) if spec.webhook_url else None,
        }
        return connection.execute(self._insert_job, values).first()

    def _note_progress(self, connection: sa.Connection, report: Report) -> Job | None:
        values = {"stage": report.stage, "fraction": report.fraction, "eta_s": report.eta_s}
        values["engine_position"] = report.engine_position
        return self._do.change(connection, is_held(report.job), message=None, **values)

    def _change_held(self, job: Job, *, message: str | None, **values: Any) -> Job | None:
        with self.database.writing() as connection:
            return self._do.change(connection, is_held(job), message=message, **values)

    def _change_all(self, *conditions: sa.ColumnElement[bool], message: str, **values: Any) -> list[Job]:
        """Change every job that meets all `conditions`, in transactions of bounded size."""
        changed: list[Job] = []
        while True:
            with self.database.writing() as connection:
                some = self._do.change_some(connection, *conditions, limit=_BATCH, message=message, **values)
            changed += some
            if len(some) < _BATCH:
                return changed

    def _publish(self, connection: sa.Connection, file: StoredFile, *, file_id: str) -> str:
        row = {"id": file_id, "key": file.key, "file": codec.dump(file), "created_at": self.database.now}
        connection.execute(sa.insert(FILES).values(row))
        return file_id


def _insert_job(database: Database) -> sa.Executable:
    """Made once: to put a statement together costs more than to run it."""
    now, start_within_s = database.now, sa.bindparam("start_within_s", type_=sa.Double)
    insert = database.insert(JOBS).values(
        state="queued", created_at=now, not_before=now, start_before=now + start_within_s
    )
    return insert.on_conflict_do_nothing().returning(JOBS)


def _lock(connection: sa.Connection, job_ids: Collection[str]) -> None:
    """Running jobs that are about to be changed, always in the same order: two who change several never deadlock."""
    in_order = sa.select(_jobs.seq).where(_RUNNING, _jobs.id.in_(job_ids)).order_by(_jobs.seq).with_for_update()
    if connection.dialect.name != "sqlite":  # which has one writer at a time
        connection.execute(in_order)


def _least(column: sa.ColumnElement[Any], *conditions: sa.ColumnElement[bool]) -> sa.ScalarSelect[Any]:
    return sa.select(sa.func.min(column)).where(*conditions).scalar_subquery()
