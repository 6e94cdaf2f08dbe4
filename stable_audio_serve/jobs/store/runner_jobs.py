"""Job operations for runners: lease jobs, renew leases, report progress, end or requeue jobs, and requeue lost jobs.

Each runner has a random name, `owner`. Only the runner that has a job's lease may change the job.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import sqlalchemy as sa

from stable_audio_serve.core.generation import Priority
from stable_audio_serve.core.ids import JobId
from stable_audio_serve.jobs.job import Job, JobError, JobRef, JobResult
from stable_audio_serve.jobs.store import codec
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.files import PublishedFiles
from stable_audio_serve.jobs.store.outbox import LONGEST_PAUSE_S
from stable_audio_serve.jobs.store.rows import is_held
from stable_audio_serve.jobs.store.tables import JOBS, count, in_state
from stable_audio_serve.jobs.store.transitions import CANCELLED, Transitions, requeued
from stable_audio_serve.jobs.store.turns import LONGEST_DELAY_S, Turns

GENERATED = 0.95  # a job's progress when its audio is generated, but not stored yet

_LATE = JobError("start_timeout", "the job could not be started in the time its client allowed")
_EXHAUSTED = JobError("unavailable", "the server was interrupted too often during this job")
_LEASE_LOCK = 0x53415503  # number of a PostgreSQL advisory lock, which no other lock in the database has
_BATCH = 500  # most rows that one statement changes

_jobs = JOBS.c
_QUEUED, _RUNNING = in_state("queued"), in_state("running")
_HAS_NOTICE = _jobs.webhook_at.is_not(None)


@dataclass(frozen=True, slots=True)
class RenewedLease:
    """The lease of a running job after it was renewed. `cancel_requested` means that the client cancelled the job."""

    ref: JobRef
    fence: int
    cancel_requested: bool


@dataclass(frozen=True, slots=True)
class Report:
    """The progress of a running job. `eta_s` is the predicted number of seconds until the job ends."""

    job: Job
    stage: str
    fraction: float
    eta_s: float | None = None
    engine_position: int | None = None


@dataclass(frozen=True, slots=True)
class Outlook:
    """The work that is pending for a runner.

    `queued` has the number of queued jobs by priority. `num_stops` is how many jobs of this runner were cancelled. Each
    of the other fields is the number of seconds until the next work of one kind is due: a job to lease, an expired
    lease, a queued job that did not start in time, a webhook. A value of 0 or less means that the work is due now, and
    None that there is no such work. If `is_set_back` is true, some times are too late (`RunnerJobs.set_back`).
    """

    queued: Mapping[Priority, int]
    num_stops: int
    lease_in_s: float | None
    reclaim_in_s: float | None
    late_in_s: float | None
    webhook_in_s: float | None
    is_set_back: bool = False

    @property
    def num_queued(self) -> int:
        return sum(self.queued.values())


class RunnerJobs:
    """The operations of runners on one job database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._transitions = Transitions(database)
        self._turns = Turns(database)
        self._files = PublishedFiles(database)

    def outlook(self, owner: str) -> Outlook:
        """Return the work that is pending for the runner `owner`. An idle runner makes only this one query."""
        now = self._database.now
        query = sa.select(
            *(count(_QUEUED, _jobs.priority == priority).label(priority) for priority in get_args(Priority)),
            count(_jobs.owner == owner, _RUNNING, _jobs.cancel_requested).label("stops"),
            (_least(_jobs.not_before, _QUEUED) - now).label("lease"),
            (_least(_jobs.lease_until, _RUNNING) - now).label("reclaim"),
            (_least(_jobs.start_before, _jobs.start_before.is_not(None)) - now).label("late"),
            (_least(_jobs.webhook_at, _HAS_NOTICE) - now).label("webhook"),
            sa.or_(count(_is_started_later(now)) > 0, _greatest(_jobs.webhook_at, _HAS_NOTICE) > now + LONGEST_PAUSE_S)
            .is_(sa.true())
            .label("is_set_back"),
        )
        with self._database.reading() as connection:
            row = connection.execute(query).one()
        queued = {priority: row._mapping[priority] for priority in get_args(Priority)}
        # A job that seems due after a longer delay is due now, as in `Turns`.
        lease_in_s = 0.0 if row.lease is not None and row.lease > LONGEST_DELAY_S else row.lease
        return Outlook(queued, row.stops, lease_in_s, row.reclaim, row.late, row.webhook, row.is_set_back)

    def set_back(self) -> int:
        """Correct times that are too late, because the database's clock was set back. Returns how many.

        Otherwise the lease of a dead runner would not expire, and a webhook would not be due, until the clock is where
        it was before. A job that has started in the future starts now, and its lease ends as long after its start as
        before, so that the lease of a running runner does not expire before the runner renews it. A lease that ends
        before its job has started was renewed after the clock was set back, and stays. A webhook that is due later than
        `LONGEST_PAUSE_S` from now is due now.
        """
        now = self._database.now
        lease_s = _jobs.lease_until - _jobs.started_at
        jobs = sa.update(JOBS).where(_is_started_later(now))
        notices = sa.update(JOBS).where(_HAS_NOTICE, _jobs.webhook_at > now + LONGEST_PAUSE_S)
        with self._database.writing() as connection:
            num_jobs = connection.execute(
                jobs.values(lease_until=sa.case((lease_s > 0, now + lease_s), else_=_jobs.lease_until), started_at=now)
            ).rowcount
            num_notices = connection.execute(notices.values(webhook_at=now)).rowcount
        return num_jobs + num_notices

    def lease(
        self,
        owner: str,
        *,
        lease_s: float,
        models: Collection[str] | None = None,
        known: Collection[str] | None = None,
        without: Collection[tuple[str, str]] = (),
        priority: Priority = "interactive",
    ) -> Job | None:
        """Lease the next queued job of one of these models to the runner `owner`, for `lease_s` seconds.

        If `models` is None, any model will do, but for an hour only those in `known`, if given: another server may
        have the others. `without` lists models and clients whose jobs must not start. Returns the job, or None if no
        job is due.
        """
        is_next = _jobs.seq == self._turns.next_job(priority, models, known=known, without=without)
        values = self._transitions.started(owner, lease_s=lease_s)
        # Without the lock, two transactions at once would both choose a job of the same client.
        with self._database.writing_alone(_LEASE_LOCK) as connection:
            job = self._transitions.change(connection, is_next, message="started", **values)
            if job is not None:
                self._turns.served(connection, job.spec)
        return job

    def renew(self, owner: str, *, lease_s: float, refs: Collection[JobRef]) -> list[RenewedLease]:
        """Renew the leases that the runner `owner` has of the jobs `refs`, until `lease_s` seconds from now.

        Returns the renewed leases. The runner has lost the leases of the other jobs in `refs`.

        `refs` are the jobs that the runner really runs. If the database's answer to `lease` was lost, the runner does
        not know that it has the lease. Then `refs` lacks the job, and the lease expires.
        """
        is_one = sa.tuple_(_jobs.contract, _jobs.client, _jobs.id).in_(refs)
        change = sa.update(JOBS).where(_jobs.owner == owner, _RUNNING, is_one)
        values = change.values(lease_until=self._database.now + lease_s)
        returning = values.returning(_jobs.contract, _jobs.client, _jobs.id, _jobs.fence, _jobs.cancel_requested)
        with self._database.writing() as connection:
            _lock(connection, {ref.id for ref in refs})
            return [RenewedLease(JobRef(*row[:3]), *row[3:]) for row in connection.execute(returning)]

    def report(self, reports: Collection[Report]) -> list[Job]:
        """Store the progress of running jobs. Returns the jobs whose lease is lost."""
        with self._database.writing() as connection:
            _lock(connection, {report.job.spec.id for report in reports})
            return [report.job for report in reports if self._note_progress(connection, report) is None]

    def succeed(self, job: Job, result: JobResult) -> Job | None:
        """End a job with its result, and publish its file, in one transaction.

        Returns the ended job, or None if its lease is lost.
        """
        values = self._transitions.ended("succeeded") | {
            "stage": "done",
            "fraction": 1.0,
            "result": codec.dump(result),
            "result_key": result.file.key,
        }
        with self._database.writing() as connection:
            message = f"finished: the generation took {result.inference_s:.2f} s"
            ended = self._transitions.change(connection, is_held(job), message=message, **values)
            if ended is not None:
                self._files.publish_in(connection, result.file, file_id=result.file_id)
        return ended

    def fail(self, job: Job, error: JobError, *, is_dead_letter: bool = False) -> Job | None:
        """End a job with an error. Returns the ended job, or None if its lease is lost."""
        values = self._transitions.ended("failed", error) | {"is_dead_letter": is_dead_letter}
        return self._change_held(job, message=error.message, **values)

    def stop(self, job: Job) -> Job | None:
        """End a job that its client has cancelled. Returns the ended job, or None if its lease is lost."""
        return self._change_held(job, message="cancelled", **self._transitions.ended("cancelled", CANCELLED))

    def requeue(
        self, job: Job, *, delay_s: float, attempts: int, message: str, has_started: bool = False
    ) -> Job | None:
        """Requeue a job, with `attempts` as its number of attempts. It starts again after `delay_s` seconds (at most
        `LONGEST_DELAY_S`) or later.

        If a model has worked on the job (`has_started`), or if attempts count, `start_within_s` limits it no more.
        If its client has cancelled the job, the job ends instead. Returns the changed job, or None if its lease is
        lost.
        """
        start_within_s = None if attempts or has_started else job.spec.start_within_s
        start_before = None if start_within_s is None else job.created_at.timestamp() + start_within_s
        # A long piece with finished sections has started in time.
        start_before_if_new = sa.case((_jobs.num_sections == 0, sa.cast(start_before, sa.Double)))
        values = requeued() | {"attempts": attempts, "start_before": start_before_if_new}
        with self._database.writing() as connection:
            cancelled = sa.select(_jobs.cancel_requested).where(is_held(job)).with_for_update()
            if connection.execute(cancelled).scalar():
                message, values = "cancelled", self._transitions.ended("cancelled", CANCELLED)
            values["not_before"] = self._database.now + min(delay_s, LONGEST_DELAY_S)
            return self._transitions.change(connection, is_held(job), message=message, **values)

    def reclaim(self, *, max_attempts: int) -> list[Job]:
        """Requeue all running jobs whose lease has expired. Returns the changed jobs.

        A job that its client has cancelled ends instead. A job that has had `max_attempts` attempts fails and becomes a
        dead letter, which an operator may retry.
        """
        is_cancelled, is_last = _jobs.cancel_requested, _jobs.attempts >= max_attempts
        dead = self._transitions.ended("failed", _EXHAUSTED) | {"is_dead_letter": True}
        reclaimed: list[Job] = []
        for condition, message, values in (
            (is_cancelled, "cancelled", self._transitions.ended("cancelled", CANCELLED)),
            (sa.and_(is_last, sa.not_(is_cancelled)), _EXHAUSTED.message, dead),
            (sa.not_(sa.or_(is_cancelled, is_last)), "put back: its runner was lost", requeued()),
        ):
            is_lost = (_RUNNING, _jobs.lease_until <= self._database.now, condition)
            reclaimed += self._change_all(*is_lost, message=message, **values)
        return reclaimed

    def expire(self) -> list[Job]:
        """End the queued jobs that did not start in the time that their client allowed. Returns these jobs."""
        is_late = (_QUEUED, _jobs.start_before <= self._database.now)
        return self._change_all(*is_late, message=_LATE.message, **self._transitions.ended("failed", _LATE))

    def _note_progress(self, connection: sa.Connection, report: Report) -> Job | None:
        values = {"stage": report.stage, "fraction": report.fraction, "eta_s": report.eta_s}
        values["engine_position"] = report.engine_position
        return self._transitions.change(connection, is_held(report.job), message=None, **values)

    def _change_held(self, job: Job, *, message: str | None, **values: Any) -> Job | None:
        with self._database.writing() as connection:
            return self._transitions.change(connection, is_held(job), message=message, **values)

    def _change_all(self, *conditions: sa.ColumnElement[bool], message: str, **values: Any) -> list[Job]:
        """Change every job that meets all `conditions`, up to `_BATCH` jobs in a transaction. Returns these jobs."""
        changed: list[Job] = []
        while True:
            with self._database.writing() as connection:
                some = self._transitions.change_some(connection, *conditions, limit=_BATCH, message=message, **values)
            changed += some
            if len(some) < _BATCH:
                return changed


def _lock(connection: sa.Connection, job_ids: Collection[JobId]) -> None:
    """Lock the rows of running jobs in a fixed order, so that two transactions with several jobs never deadlock."""
    if connection.dialect.name == "sqlite":
        return  # it needs no row locks, because it has a single writer
    # Two queries, because a session avoids sorting: with one, PostgreSQL would read all jobs, ended ones too, in order.
    found = connection.execute(sa.select(_jobs.seq).where(_RUNNING, _jobs.id.in_(job_ids))).scalars().all()
    connection.execute(sa.select(_jobs.seq).where(_jobs.seq.in_(found)).order_by(_jobs.seq).with_for_update())


def _is_started_later(now: sa.ColumnElement[float]) -> sa.ColumnElement[bool]:
    return sa.and_(_RUNNING, _jobs.started_at > now)


def _greatest(column: sa.ColumnElement[Any], *conditions: sa.ColumnElement[bool]) -> sa.ScalarSelect[Any]:
    return sa.select(sa.func.max(column)).where(*conditions).scalar_subquery()


def _least(column: sa.ColumnElement[Any], *conditions: sa.ColumnElement[bool]) -> sa.ScalarSelect[Any]:
    return sa.select(sa.func.min(column)).where(*conditions).scalar_subquery()
