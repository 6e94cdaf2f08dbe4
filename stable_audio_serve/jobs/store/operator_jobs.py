"""Operations on the jobs of all clients, for operators and for autoscaling: find, list and count jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa

from stable_audio_serve.core.ids import JobId
from stable_audio_serve.core.pricing import WorkSize
from stable_audio_serve.jobs.job import Job, State
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.rows import to_job
from stable_audio_serve.jobs.store.tables import IS_DEAD, JOBS, RUNNING, WAITING, WORK, count, in_state

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


@dataclass(frozen=True, slots=True)
class Waiting:
    """The number of one model's queued jobs, and the sum of their predicted work."""

    num_jobs: int = 0
    size: WorkSize = field(default_factory=WorkSize)


class OperatorJobs:
    """The operations on the jobs of all clients in one database."""

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

    def waiting_work(self) -> Mapping[str, Waiting]:
        """Return the number and the work of the queued jobs of each model. Models without queued jobs are missing.

        The query reads only an index, which has an entry for each queued job.
        """
        sums = (sa.func.sum(_jobs[column]) for column in WORK)
        query = sa.select(_jobs.model, sa.func.count(), *sums).where(in_state("queued")).group_by(_jobs.model)
        with self._database.reading() as connection:
            return {model: Waiting(number, WorkSize(*sizes)) for model, number, *sizes in connection.execute(query)}
