"""Where jobs are kept: SQL tables in which every transition is a compare-and-set, fenced by leases.

Blocking: call it from worker threads. Knows states, leases and owners, not what jobs do. Runs on SQLite and PostgreSQL.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sa

from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.core.errors import ConflictError, OverloadedError, QuotaError
from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs import codec
from stable_audio_serve.jobs.database import EVENTS, FILES, JOBS, Database
from stable_audio_serve.jobs.job import Contract, Job, JobError, JobEvent, JobResult, JobSpec, Lease, State

CancelOutcome = Literal["removed", "requested", "already_over", "unknown"]

_FULL_RETRY_S = 10.0
_CANCELLED = JobError("cancelled", "the job was cancelled")
_LATE = JobError("start_timeout", "the job could not be started in the time its client allowed")
_EXHAUSTED = JobError("unavailable", "the server was interrupted too often during this job")

_jobs = JOBS.c


@dataclass(frozen=True, slots=True)
class Added:
    """A job that is kept now; not new when the same request was kept before."""

    job: Job
    is_new: bool


@dataclass(frozen=True, slots=True)
class Held:
    """A running job whose lease was renewed."""

    contract: Contract
    id: str
    fence: int
    cancel_requested: bool


@dataclass(frozen=True, slots=True)
class Page:
    """Some jobs, newest first; `next_cursor` leads to the older ones, if any."""

    jobs: tuple[Job, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a runner may have to do: counts, and seconds until something is due (0 or less: now; None: never)."""

    num_queued: int
    num_stops: int
    lease_in_s: float | None
    reclaim_in_s: float | None
    late_in_s: float | None
    webhook_in_s: float | None


class JobStore:
    """Jobs by (contract, id). An `owner` is one life of one runner; only the holder of a job's lease may change it."""

    def __init__(self, database: Database, limits: JobSettings | None = None) -> None:
        """Touches nothing yet."""
        self.database = database
        self._limits = limits or JobSettings()

    # What clients do

    def add(self, spec: JobSpec) -> Added:
        """Keep a new job, or find the one that the same request made before.

        Raises ConflictError (`field` is "Idempotency-Key" or "id") when that was another request, QuotaError and
        OverloadedError when too many are waiting, StorageError.
        """
        with self.database.writing() as connection:
            if earlier := self._same(connection, spec):
                return Added(earlier, is_new=False)
            self._check_room(connection, spec)
            now = self.database.now
            patience_s = self._limits.batch_patience_s if spec.priority == "batch" else 0.0
            values = {
                **{"contract": spec.contract, "id": spec.id, "client": spec.client, "model": spec.model},
                **{"state": "queued", "created_at": now, "not_before": now, "turn": now + patience_s},
                **{"spec": codec.dump(spec), "fingerprint": spec.fingerprint, "idempotency_key": spec.idempotency_key},
                "start_before": None if spec.start_within_s is None else now + spec.start_within_s,
                "upload_key": spec.upload.file.key if spec.upload else None,
                "webhook_url": spec.webhook_url,
            }
            insert = self.database.insert(JOBS).values(values).on_conflict_do_nothing().returning(JOBS)
            row = connection.execute(insert).first()
            if row is not None:
                self._note(connection, row, message="queued")
                return Added(to_job(row), is_new=True)
            if earlier := self._same(connection, spec):  # somebody was faster
                return Added(earlier, is_new=False)
        raise ConflictError("id: this id is in use", field="id")

    def get(self, contract: Contract, job_id: str) -> Job | None:
        """The job as it is now."""
        with self.database.reading() as connection:
            row = connection.execute(sa.select(JOBS).where(_is(contract, job_id))).first()
        return None if row is None else to_job(row)

    def list_own(
        self, contract: Contract, client: str, *, state: State | None = None, cursor: str | None = None, limit: int = 20
    ) -> Page:
        """One client's jobs, newest first. Raises ValueError for a cursor that is none of ours."""
        conditions = [_jobs.contract == contract, _jobs.client == client]
        if state is not None:
            conditions.append(_jobs.state == state)
        if cursor is not None:
            conditions.append(_jobs.seq < int(cursor))
        query = sa.select(JOBS).where(*conditions).order_by(_jobs.seq.desc()).limit(limit + 1)
        with self.database.reading() as connection:
            rows = connection.execute(query).all()
        jobs = tuple(to_job(row) for row in rows[:limit])
        return Page(jobs, str(rows[limit - 1].seq) if len(rows) > limit else None)

    def events(self, contract: Contract, job_id: str, *, after: int = 0) -> tuple[JobEvent, ...]:
        """What happened to the job, in order; only what came after the event with the id `after`."""
        query = (
            sa.select(EVENTS)
            .join(JOBS, _jobs.seq == EVENTS.c.job)
            .where(_is(contract, job_id), EVENTS.c.id > after)
            .order_by(EVENTS.c.id)
        )
        with self.database.reading() as connection:
            return tuple(_to_event(row) for row in connection.execute(query))

    def position(self, job: Job) -> int:
        """How many waiting jobs of its model come before this one."""
        own = sa.select(_jobs.turn, _jobs.seq).where(_is(job.spec.contract, job.spec.id)).cte()
        is_before = sa.or_(_jobs.turn < own.c.turn, sa.and_(_jobs.turn == own.c.turn, _jobs.seq < own.c.seq))
        query = (
            sa.select(sa.func.count())
            .select_from(JOBS)
            .join(own, is_before)
            .where(_jobs.state == "queued", _jobs.model == job.spec.model)
        )
        with self.database.reading() as connection:
            return int(connection.execute(query).scalar_one())

    def cancel(self, contract: Contract, job_id: str) -> tuple[CancelOutcome, Job | None]:
        """End a waiting job, or ask the owner of a running one to stop; and the job afterwards."""
        is_it = _is(contract, job_id)
        ended = self._change(is_it, _jobs.state == "queued", message="cancelled", **self._end("cancelled", _CANCELLED))
        if ended is not None:
            return "removed", ended
        asked = self._change(is_it, _jobs.state == "running", message="cancellation requested", cancel_requested=True)
        if asked is not None:
            return "requested", asked
        job = self.get(contract, job_id)
        return ("unknown", None) if job is None else ("already_over", job)

    def find_file(self, file_id: str) -> StoredFile | None:
        """The published file with this id."""
        with self.database.reading() as connection:
            text = connection.execute(sa.select(FILES.c.file).where(FILES.c.id == file_id)).scalar()
        return None if text is None else codec.load_file(text)

    def publish(self, file: StoredFile, *, file_id: str | None = None) -> str:
        """Give a file an unguessable id of its own, unless it has one. Raises StorageError, also for a used id."""
        with self.database.writing() as connection:
            return self._publish(connection, file, file_id=file_id)

    # What runners do

    def lease(self, owner: str, *, lease_s: float, models: Collection[str] | None = None) -> Job | None:
        """Start the waiting job whose turn it is, of these models; it is the owner's for `lease_s` from now."""
        now = self.database.now
        conditions = [_jobs.state == "queued", _jobs.not_before <= now]
        conditions.append(sa.or_(_jobs.start_before.is_(None), _jobs.start_before > now))
        if models is not None:
            conditions.append(_jobs.model.in_(models))
        return self._change(
            *conditions,
            order=(_jobs.turn, _jobs.seq),
            message="started",
            **{"state": "running", "owner": owner, "fence": _jobs.fence + 1, "lease_until": now + lease_s},
            **{"attempts": _jobs.attempts + 1, "started_at": now, "start_before": None},
            **{"stage": "started", "fraction": 0.0, "eta_s": None},
        )

    def renew(self, owner: str, *, lease_s: float) -> list[Held]:
        """Hold on to every running job of this owner for `lease_s` from now; those that are not named are lost."""
        change = sa.update(JOBS).where(_jobs.owner == owner, _jobs.state == "running")
        values = change.values(lease_until=self.database.now + lease_s)
        returning = values.returning(_jobs.contract, _jobs.id, _jobs.fence, _jobs.cancel_requested)
        with self.database.writing() as connection:
            return [Held(*row) for row in connection.execute(returning)]

    def reclaim(self, *, max_attempts: int) -> list[Job]:
        """Take every running job whose lease ran out from its owner; the jobs afterwards.

        They wait again, are cancelled if that was asked, or, after `max_attempts`, are dead letters.
        """
        is_lost = (_jobs.state == "running", _jobs.lease_until <= self.database.now)
        is_last = _jobs.attempts >= max_attempts
        reclaimed = []
        for condition, message, values in (
            (_jobs.cancel_requested, "cancelled", self._end("cancelled", _CANCELLED)),
            (is_last, _EXHAUSTED.message, self._end("failed", _EXHAUSTED) | {"is_dead_letter": True}),
            (sa.not_(sa.or_(is_last, _jobs.cancel_requested)), "put back: its runner was lost", _waiting_again()),
        ):
            while job := self._change(*is_lost, condition, message=message, **values):
                reclaimed.append(job)
        return reclaimed

    def report(
        self, job: Job, *, stage: str, fraction: float, eta_s: float | None = None, message: str | None = None
    ) -> bool:
        """Note progress of a running job; false when its lease is lost."""
        values: dict[str, Any] = {"stage": stage, "fraction": fraction, "eta_s": eta_s}
        return self._change(*_held(job), message=message, **values) is not None

    def succeed(self, job: Job, result: JobResult) -> Job | None:
        """End a job with its result, whose file is published by the same commit; None when its lease is lost."""
        values = self._end("succeeded") | {"result": codec.dump(result), "result_key": result.file.key}
        with self.database.writing() as connection:
            ended = self._change_in(connection, *_held(job), message="finished", **values, stage="done", fraction=1.0)
            if ended is not None:
                self._publish(connection, result.file, file_id=result.file_id)
        return ended

    def fail(self, job: Job, error: JobError, *, is_dead_letter: bool = False) -> Job | None:
        """End a job with an error; None when its lease is lost."""
        values = self._end("failed", error) | {"is_dead_letter": is_dead_letter}
        return self._change(*_held(job), message=error.message, **values)

    def stop(self, job: Job) -> Job | None:
        """End a running job whose cancellation was requested; None when its lease is lost."""
        return self._change(*_held(job), message="cancelled", **self._end("cancelled", _CANCELLED))

    def requeue(self, job: Job, *, delay_s: float, attempts: int, message: str) -> Job | None:
        """Put a running job back to wait `delay_s`, with `attempts` counted; None when its lease is lost."""
        start_within_s = None if attempts else job.spec.start_within_s
        start_before = None if start_within_s is None else job.created_at.timestamp() + start_within_s
        values = _waiting_again() | {"attempts": attempts, "start_before": start_before}
        return self._change(*_held(job), message=message, **values, not_before=self.database.now + delay_s)

    def expire(self) -> list[Job]:
        """End the waiting jobs whose time to start is over."""
        expired = []
        is_late = (_jobs.state == "queued", _jobs.start_before <= self.database.now)
        while job := self._change(*is_late, message=_LATE.message, **self._end("failed", _LATE)):
            expired.append(job)
        return expired

    def look(self, owner: str) -> Outlook:
        """What there is to do, in one query: all that an idle runner asks."""
        now = self.database.now
        queued, running = _jobs.state == "queued", _jobs.state == "running"
        asked_to_stop = sa.and_(_jobs.owner == owner, running, _jobs.cancel_requested)
        query = sa.select(
            _count(queued).label("queued"),
            _count(asked_to_stop).label("stops"),
            (_least(_jobs.not_before, queued) - now).label("lease"),
            (_least(_jobs.lease_until, running) - now).label("reclaim"),
            (_least(_jobs.start_before, queued) - now).label("late"),
            (_least(_jobs.webhook_at) - now).label("webhook"),
        )
        with self.database.reading() as connection:
            row = connection.execute(query).one()
        return Outlook(row.queued, row.stops, row.lease, row.reclaim, row.late, row.webhook)

    # What operators do

    def list_all(self, *, state: State | None = None, dead_letters: bool = False, limit: int = 100) -> Sequence[Job]:
        """Everybody's jobs, newest first."""
        query = sa.select(JOBS).order_by(_jobs.seq.desc()).limit(limit)
        if state is not None:
            query = query.where(_jobs.state == state)
        if dead_letters:
            query = query.where(_jobs.is_dead_letter)
        with self.database.reading() as connection:
            return [to_job(row) for row in connection.execute(query)]

    def retry(self, contract: Contract, job_id: str) -> Job | None:
        """Let a dead letter wait again, its attempts forgotten; None when the job is none."""
        values = _waiting_again() | {"attempts": 0, "is_dead_letter": False, "error": None, "completed_at": None}
        values |= {"webhook_at": None, "webhook_attempts": 0, "not_before": self.database.now}
        return self._change(_is(contract, job_id), _jobs.is_dead_letter, message="tried again by an operator", **values)

    def counts(self) -> Mapping[State, int]:
        """Jobs by state."""
        query = sa.select(_jobs.state, sa.func.count()).group_by(_jobs.state)
        with self.database.reading() as connection:
            return {state: count for state, count in connection.execute(query)}  # noqa: C416

    # What the sweeper does

    def purge(self, *, age_s: float, limit: int = 100) -> list[str]:
        """Forget jobs that ended, and files published, `age_s` ago and more; keys of the files nobody knows now."""
        before = self.database.now - age_s
        old_jobs = sa.select(_jobs.seq).where(_jobs.completed_at <= before).order_by(_jobs.completed_at).limit(limit)
        old_files = sa.select(FILES.c.id).where(FILES.c.created_at <= before).order_by(FILES.c.created_at).limit(limit)
        with self.database.writing() as connection:
            forgotten = connection.execute(
                sa.delete(JOBS).where(_jobs.seq.in_(old_jobs)).returning(_jobs.upload_key, _jobs.result_key)
            ).all()
            keys = [key for row in forgotten for key in row if key is not None]
            connection.execute(sa.delete(FILES).where(FILES.c.key.in_(keys)))
            removed = connection.execute(sa.delete(FILES).where(FILES.c.id.in_(old_files)).returning(FILES.c.key)).all()
        return list(dict.fromkeys([*keys, *(row.key for row in removed)]))

    def unreferenced(self, keys: Collection[str]) -> list[str]:
        """Those of `keys` that no job and no published file needs."""
        known: set[str] = set()
        with self.database.reading() as connection:
            for column, *conditions in (
                (_jobs.upload_key, sa.or_(_jobs.completed_at.is_(None), _jobs.is_dead_letter)),
                (_jobs.result_key,),
                (FILES.c.key,),
            ):
                known.update(connection.execute(sa.select(column).where(column.in_(keys), *conditions)).scalars())
        return [key for key in keys if key not in known]

    # Inside

    def _same(self, connection: sa.Connection, spec: JobSpec) -> Job | None:
        """The job that this request made before. Raises ConflictError when another one has its key or id."""
        by_key = sa.and_(
            _jobs.contract == spec.contract,
            _jobs.client == spec.client,
            _jobs.idempotency_key == spec.idempotency_key,
        )
        for condition, field, used in (
            (by_key if spec.idempotency_key is not None else None, "Idempotency-Key", "key"),
            (_is(spec.contract, spec.id), "id", "id"),
        ):
            row = None if condition is None else connection.execute(sa.select(JOBS).where(condition)).first()
            if row is not None:
                if not spec.fingerprint or row.fingerprint != spec.fingerprint or row.client != spec.client:
                    raise ConflictError(f"{field}: this {used} was used for another request", field=field)
                return to_job(row)
        return None

    def _check_room(self, connection: sa.Connection, spec: JobSpec) -> None:
        queued = _jobs.state == "queued"
        waiting = connection.execute(
            sa.select(_count(queued).label("all"), _count(queued, _jobs.client == spec.client).label("own"))
        ).one()
        if waiting.all >= self._limits.max_queued:
            raise OverloadedError("the job queue is full", retry_after_s=_FULL_RETRY_S)
        if waiting.own >= self._limits.max_queued_per_key:
            raise QuotaError("too many jobs of this key are waiting", retry_after_s=_FULL_RETRY_S)

    def _change(self, *conditions: Any, message: str | None, order: Sequence[Any] = (), **values: Any) -> Job | None:
        """Apply `values` to the first job that meets all `conditions`; None when none does."""
        with self.database.writing() as connection:
            return self._change_in(connection, *conditions, message=message, order=order, **values)

    def _change_in(
        self, connection: sa.Connection, *conditions: Any, message: str | None, order: Sequence[Any] = (), **values: Any
    ) -> Job | None:
        first = sa.select(_jobs.seq).where(*conditions).order_by(*order).limit(1)
        locked = first.with_for_update(skip_locked=bool(order)).scalar_subquery()
        change = sa.update(JOBS).where(_jobs.seq == locked, *conditions).values(**values).returning(JOBS)
        row = connection.execute(change).first()
        if row is None:
            return None
        self._note(connection, row, message=message)
        return to_job(row)

    def _note(self, connection: sa.Connection, row: sa.Row[Any], *, message: str | None) -> None:
        values = {"job": row.seq, "at": self.database.now, "stage": row.stage, "fraction": row.fraction}
        connection.execute(sa.insert(EVENTS).values(**values, eta_s=row.eta_s, message=message))

    def _end(self, state: State, error: JobError | None = None) -> dict[str, Any]:
        now = self.database.now
        return {
            **{"state": state, "completed_at": now, "owner": None, "lease_until": None, "start_before": None},
            **{"eta_s": None, "error": None if error is None else codec.dump(error)},
            "webhook_at": sa.case((_jobs.webhook_url.is_not(None), now)),
        }

    def _publish(self, connection: sa.Connection, file: StoredFile, *, file_id: str | None = None) -> str:
        file_id = file_id or secrets.token_hex(16)
        row = {"id": file_id, "key": file.key, "file": codec.dump(file), "created_at": self.database.now}
        connection.execute(sa.insert(FILES).values(row))
        return file_id


def _is(contract: Contract, job_id: str) -> sa.ColumnElement[bool]:
    return sa.and_(_jobs.contract == contract, _jobs.id == job_id)


def _held(job: Job) -> tuple[sa.ColumnElement[bool], ...]:
    """That a job is still the one that was leased."""
    lease = job.lease or Lease("", -1)
    is_it = _is(job.spec.contract, job.spec.id)
    return (is_it, _jobs.state == "running", _jobs.owner == lease.owner, _jobs.fence == lease.fence)


def _count(*conditions: sa.ColumnElement[bool]) -> sa.ScalarSelect[int]:
    return sa.select(sa.func.count()).select_from(JOBS).where(*conditions).scalar_subquery()


def _least(column: sa.ColumnElement[Any], *conditions: sa.ColumnElement[bool]) -> sa.ScalarSelect[Any]:
    return sa.select(sa.func.min(column)).where(*conditions).scalar_subquery()


def _waiting_again() -> dict[str, Any]:
    return {
        **{"state": "queued", "owner": None, "lease_until": None, "started_at": None, "eta_s": None},
        **{"stage": "queued", "fraction": 0.0},
    }


def to_job(row: sa.Row[Any]) -> Job:
    """The job in a row of the table."""
    return Job(
        spec=codec.load_spec(row.spec),
        state=row.state,
        created_at=datetime.fromtimestamp(row.created_at, UTC),
        started_at=_to_time(row.started_at),
        completed_at=_to_time(row.completed_at),
        attempts=row.attempts,
        cancel_requested=row.cancel_requested,
        stage=row.stage,
        fraction=row.fraction,
        eta_s=row.eta_s,
        lease=None if row.owner is None else Lease(row.owner, row.fence),
        is_dead_letter=row.is_dead_letter,
        result=None if row.result is None else codec.load_result(row.result),
        error=None if row.error is None else codec.load_error(row.error),
    )


def _to_event(row: sa.Row[Any]) -> JobEvent:
    at = datetime.fromtimestamp(row.at, UTC)
    return JobEvent(row.id, at, row.stage, row.fraction, row.eta_s, row.message)


def _to_time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
