"""What operators may do with jobs: find everybody's, count them, retry dead letters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sqlalchemy as sa

from stable_audio_serve.core.ids import JobId
from stable_audio_serve.jobs.job import Job, JobRef, State
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.rows import is_job, to_job
from stable_audio_serve.jobs.store.tables import IS_DEAD, JOBS
from stable_audio_serve.jobs.store.transitions import Transitions, waiting_again

_jobs = JOBS.c


class OperatorJobs:
    """Jobs of one database as operators may use them."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._transitions = Transitions(database)

    def find_all(self, job_id: JobId) -> Sequence[Job]:
        """Returns everybody's jobs with this id, of all contracts, in order of arrival."""
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(JOBS).where(_jobs.id == job_id)).all()
        return [to_job(row) for row in sorted(rows, key=lambda row: row.seq)]

    def list_all(self, *, state: State | None = None, dead_letters: bool = False, limit: int = 100) -> Sequence[Job]:
        """Returns everybody's jobs, newest first."""
        query = sa.select(JOBS).order_by(_jobs.seq.desc()).limit(limit)
        if state is not None:
            query = query.where(_jobs.state == state)
        if dead_letters:
            query = query.where(IS_DEAD)
        with self._database.reading() as connection:
            return [to_job(row) for row in connection.execute(query)]

    def retry(self, ref: JobRef) -> Job | None:
        """Put a dead letter back into the queue with no attempts counted. Returns None when the job is not one."""
        values = waiting_again() | {
            "attempts": 0,
            "is_dead_letter": False,
            "error": None,
            "completed_at": None,
            "cancel_requested": False,
            "webhook_at": None,
            "webhook_attempts": 0,
            "retries": _jobs.retries + 1,
            "not_before": self._database.now,
        }
        is_dead = sa.and_(is_job(ref), _jobs.is_dead_letter)
        with self._database.writing() as connection:
            return self._transitions.change(connection, is_dead, message="tried again by an operator", **values)

    def counts(self) -> Mapping[State, int]:
        """Returns the number of jobs in each state that has any."""
        query = sa.select(_jobs.state, sa.func.count()).group_by(_jobs.state)
        with self._database.reading() as connection:
            return {state: count for state, count in connection.execute(query)}  # noqa: C416
