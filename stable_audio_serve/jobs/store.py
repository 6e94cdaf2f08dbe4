"""Where jobs are kept: one SQL table in which every transition is a compare-and-set.

Blocking: call it from worker threads. Knows states and owners, not what jobs do; needs nothing that only SQLite has.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sa

from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.core.errors import OverloadedError
from stable_audio_serve.jobs import codec
from stable_audio_serve.jobs.database import FILES, JOBS, Database
from stable_audio_serve.jobs.job import Contract, Job, JobError, JobLog, JobResult, JobSpec, State

CancelOutcome = Literal["removed", "requested", "already_over", "unknown"]

_FULL_RETRY_S = 10.0
_PRIORITIES = {"interactive": 0, "batch": 1}
_CANCELLED = JobError("cancelled", "the job was cancelled")
_LATE = JobError("start_timeout", "the job could not be started in the time its client allowed")

_jobs = JOBS.c


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a runner may have to do: counts, and seconds until something is due (0 or less: now; None: never)."""

    num_queued: int
    num_stops: int
    claim_in_s: float | None
    late_in_s: float | None
    webhook_in_s: float | None


class JobStore:
    """Jobs by (contract, id). An `owner` is one life of one runner; only it may change what it has claimed."""

    def __init__(self, database: Database, *, max_queued: int = 1000, now: Callable[[], float] = time.time) -> None:
        """`now` gives Unix time in seconds."""
        self.database = database
        self._max_queued = max_queued
        self._now = now

    # What clients do

    def add(self, spec: JobSpec) -> Job:
        """Keep a new job. Raises OverloadedError when too many are waiting, StorageError."""
        now = self._now()
        values = {
            **{"contract": spec.contract, "id": spec.id, "state": "queued", "created_at": now, "not_before": now},
            "priority": _PRIORITIES[spec.priority],
            "spec": codec.dump(spec),
            "start_before": _start_before(spec, now),
            "logs": self._appended("[]", "queued"),
            "webhook_url": spec.webhook_url,
        }
        with self.database.writing() as connection:
            waiting = sa.select(sa.func.count()).where(_jobs.state == "queued")
            if connection.execute(waiting).scalar_one() >= self._max_queued:
                raise OverloadedError("the job queue is full", retry_after_s=_FULL_RETRY_S)
            return to_job(connection.execute(sa.insert(JOBS).values(values).returning(JOBS)).one())

    def get(self, contract: Contract, job_id: str) -> Job | None:
        """The job as it is now."""
        with self.database.reading() as connection:
            row = connection.execute(sa.select(JOBS).where(_is(contract, job_id))).first()
        return None if row is None else to_job(row)

    def position(self, job: Job) -> int:
        """How many waiting jobs come before this one."""
        own = sa.select(_jobs.seq).where(_is(job.spec.contract, job.spec.id)).scalar_subquery()
        priority = _PRIORITIES[job.spec.priority]
        is_before = sa.or_(_jobs.priority < priority, sa.and_(_jobs.priority == priority, _jobs.seq < own))
        with self.database.reading() as connection:
            query = sa.select(sa.func.count()).where(_jobs.state == "queued", is_before)
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

    def claim(self, owner: str) -> Job | None:
        """Start the next waiting job: normal before low priority, then first come, first served."""
        now = self._now()
        is_due = _jobs.not_before + 0.0 <= now  # a sum, so that the index of turns is used and not that of delays
        is_in_time = sa.or_(_jobs.start_before.is_(None), _jobs.start_before > now)
        order = (_jobs.priority, _jobs.seq)
        return self._change(
            *(_jobs.state == "queued", is_due, is_in_time),
            order=order,
            message="started",
            **{"state": "running", "owner": owner, "attempts": _jobs.attempts + 1, "started_at": now},
            **{"start_before": None, "stage": "started", "fraction": 0.0},
        )

    def report(self, job: Job, owner: str, *, stage: str, fraction: float, message: str) -> bool:
        """Note progress of a running job; false when it is no longer this owner's."""
        return self._change(*_owned(job, owner), message=message, stage=stage, fraction=fraction) is not None

    def succeed(self, job: Job, owner: str, result: JobResult) -> Job | None:
        """End a job with its result, whose file is published by the same commit; None when it is not this owner's."""
        with self.database.writing() as connection:
            ended = self._change_in(
                connection,
                *_owned(job, owner),
                message="finished",
                **self._end("succeeded") | {"result": codec.dump(result), "stage": "done", "fraction": 1.0},
            )
            if ended is not None:
                self._publish(connection, result.file, file_id=result.file_id)
        return ended

    def fail(self, job: Job, owner: str, error: JobError) -> Job | None:
        """End a job with an error; None when it is not this owner's."""
        return self._change(*_owned(job, owner), message=error.message, **self._end("failed", error))

    def stop(self, job: Job, owner: str) -> Job | None:
        """End a running job whose cancellation was requested; None when it is not this owner's."""
        return self._change(*_owned(job, owner), message="cancelled", **self._end("cancelled", _CANCELLED))

    def requeue(self, job: Job, owner: str, *, delay_s: float, attempts: int, message: str) -> Job | None:
        """Put a running job back to wait `delay_s`, with `attempts` counted; None when it is not this owner's."""
        start_before = None if attempts else _start_before(job.spec, job.created_at.timestamp())
        values = _waiting_again() | {"attempts": attempts, "start_before": start_before}
        return self._change(*_owned(job, owner), message=message, **values, not_before=self._now() + delay_s)

    def adopt(self, owner: str) -> list[Job]:
        """Take over every running job of other owners, which must be dead; still running, to be requeued or ended."""
        adopted = []
        while job := self._change(
            _jobs.state == "running", _jobs.owner != owner, message="the runner was restarted", owner=owner
        ):
            adopted.append(job)
        return adopted

    def expire(self) -> list[Job]:
        """End the waiting jobs whose time to start is over."""
        expired = []
        is_late = (_jobs.state == "queued", _jobs.start_before <= self._now())
        while job := self._change(*is_late, message=_LATE.message, **self._end("failed", _LATE)):
            expired.append(job)
        return expired

    def cancellations(self, owner: str) -> list[tuple[str, str]]:
        """(contract, id) of this owner's running jobs that were asked to stop."""
        query = sa.select(_jobs.contract, _jobs.id).where(_asked_to_stop(owner))
        with self.database.reading() as connection:
            return [(row.contract, row.id) for row in connection.execute(query)]

    def look(self, owner: str) -> Outlook:
        """What there is to do, in one query: all that an idle runner asks."""
        now = self._now()
        queued = _jobs.state == "queued"
        query = sa.select(
            _count(queued).label("queued"),
            _count(_asked_to_stop(owner)).label("stops"),
            sa.select(sa.func.min(_jobs.not_before)).where(queued).scalar_subquery().label("not_before"),
            sa.select(sa.func.min(_jobs.start_before)).where(queued).scalar_subquery().label("start_before"),
            sa.select(sa.func.min(_jobs.webhook_at)).scalar_subquery().label("webhook_at"),
        )
        with self.database.reading() as connection:
            row = connection.execute(query).one()
        return Outlook(
            num_queued=row.queued,
            num_stops=row.stops,
            claim_in_s=None if row.not_before is None else row.not_before - now,
            late_in_s=None if row.start_before is None else row.start_before - now,
            webhook_in_s=None if row.webhook_at is None else row.webhook_at - now,
        )

    # Inside

    def _change(self, *conditions: Any, message: str, order: Sequence[Any] = (), **values: Any) -> Job | None:
        """Apply `values` to the first job that meets all `conditions`; None when none does."""
        with self.database.writing() as connection:
            return self._change_in(connection, *conditions, message=message, order=order, **values)

    def _change_in(
        self, connection: sa.Connection, *conditions: Any, message: str, order: Sequence[Any] = (), **values: Any
    ) -> Job | None:
        query = sa.select(_jobs.seq, _jobs.logs).where(*conditions).order_by(*order).limit(1)
        found = connection.execute(query.with_for_update(skip_locked=bool(order))).first()
        if found is None:
            return None
        change = sa.update(JOBS).where(_jobs.seq == found.seq, *conditions).returning(JOBS)
        row = connection.execute(change.values(**values, logs=self._appended(found.logs, message))).first()
        return None if row is None else to_job(row)

    def _end(self, state: State, error: JobError | None = None) -> dict[str, Any]:
        now = self._now()
        return {
            **{"state": state, "completed_at": now, "owner": None, "start_before": None},
            "error": None if error is None else codec.dump(error),
            "webhook_at": sa.case((_jobs.webhook_url.is_not(None), now)),
        }

    def _appended(self, logs: str, message: str) -> str:
        at = datetime.fromtimestamp(self._now(), UTC)
        return codec.dump((*codec.load_logs(logs), JobLog(at, message)))

    def _publish(self, connection: sa.Connection, file: StoredFile, *, file_id: str | None = None) -> str:
        file_id = file_id or secrets.token_hex(16)
        row = {"id": file_id, "file": codec.dump(file), "created_at": self._now()}
        connection.execute(sa.insert(FILES).values(row))
        return file_id


def _is(contract: Contract, job_id: str) -> sa.ColumnElement[bool]:
    return sa.and_(_jobs.contract == contract, _jobs.id == job_id)


def _owned(job: Job, owner: str) -> tuple[sa.ColumnElement[bool], ...]:
    return (_is(job.spec.contract, job.spec.id), _jobs.state == "running", _jobs.owner == owner)


def _asked_to_stop(owner: str) -> sa.ColumnElement[bool]:
    return sa.and_(_jobs.state == "running", _jobs.owner == owner, _jobs.cancel_requested)


def _count(condition: sa.ColumnElement[bool]) -> sa.ScalarSelect[int]:
    return sa.select(sa.func.count()).select_from(JOBS).where(condition).scalar_subquery()


def _waiting_again() -> dict[str, Any]:
    return {"state": "queued", "owner": None, "started_at": None, "stage": "queued", "fraction": 0.0}


def _start_before(spec: JobSpec, created_at: float) -> float | None:
    return None if spec.start_within_s is None else created_at + spec.start_within_s


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
        logs=codec.load_logs(row.logs),
        result=None if row.result is None else codec.load_result(row.result),
        error=None if row.error is None else codec.load_error(row.error),
    )


def _to_time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
