"""Job operations for operators: find, list and count the jobs of all clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from stable_audio_serve.core.ids import JobId
from stable_audio_serve.jobs.job import Job, State
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.rows import to_job
from stable_audio_serve.jobs.store.tables import IS_DEAD, JOBS, RUNNING, WAITING, count

_jobs = JOBS.c


@dataclass(frozen=True, slots=True)
class Unfinished:
    """Numbers of queued jobs, running jobs and dead letters.

    `waited_s` is how many seconds ago the first queued job became due. It is 0 if no queued job is due yet, and None if
    no job is queued.
    """

    num_queued: int
    num_running: int
    num_dead_letters: int
    waited_s: float | None


class OperatorJobs:
    """The operations of operators on one job database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def find_all(self, job_id: JobId) -> Sequence[Job]:
        """Return the jobs with this id, of all clients and contracts (HTTP APIs), in order of arrival."""
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(JOBS).where(_jobs.id == job_id)).all()
        return [to_job(row) for row in sorted(rows, key=lambda row: row.seq)]

    def list_all(self, *, state: State | None = None, dead_letters: bool = False, limit: int = 100) -> Sequence[Job]:
        """Return up to `limit` jobs of all clients, newest first. `state` and `dead_letters` restrict the result."""
        query = sa.select(JOBS).order_by(_jobs.seq.desc()).limit(limit)
        if state is not None:
            query = query.where(_jobs.state == state)
        if dead_letters:
            query = query.where(IS_DEAD)
        with self._database.reading() as connection:
            return [to_job(row) for row in connection.execute(query)]

    def unfinished(self) -> Unfinished:
        """Count the queued jobs, running jobs and dead letters. The query does not read finished jobs."""
        due = sa.select(sa.func.min(_jobs.not_before)).where(WAITING).scalar_subquery()
        query = sa.select(
            count(WAITING).label("queued"),
            count(RUNNING).label("running"),
            count(IS_DEAD).label("dead"),
            (self._database.now - due).label("waited"),
        )
        with self._database.reading() as connection:
            row = connection.execute(query).one()
        waited_s = None if row.waited is None else max(0.0, row.waited)
        return Unfinished(row.queued, row.running, row.dead, waited_s)

    def counts(self) -> Mapping[State, int]:
        """Return the number of jobs in each state. States without jobs are missing."""
        query = sa.select(_jobs.state, sa.func.count()).group_by(_jobs.state)
        with self._database.reading() as connection:
            return {state: number for state, number in connection.execute(query)}  # noqa: C416
