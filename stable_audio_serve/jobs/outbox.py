"""Which ended jobs their clients still have to be told of. Part of the jobs' own table, so it survives restarts."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from stable_audio_serve.jobs.database import Database
from stable_audio_serve.jobs.job import Job
from stable_audio_serve.jobs.tables import JOBS
from stable_audio_serve.jobs.transitions import to_job

_jobs = JOBS.c


@dataclass(frozen=True, slots=True)
class Notice:
    """A client to be told: where, of which job, and how often that failed already."""

    url: str
    job: Job
    num_failures: int


class Outbox:
    """Notices that are due; each is tried until it is settled. Blocking: for worker threads."""

    def __init__(self, database: Database) -> None:
        """Touches nothing yet."""
        self._database = database

    def due(self, *, limit: int) -> list[Notice]:
        """What should be delivered now, oldest first."""
        query = sa.select(JOBS).where(_jobs.webhook_at <= self._database.now).order_by(_jobs.webhook_at).limit(limit)
        with self._database.reading() as connection:
            return [Notice(row.webhook_url, to_job(row), row.webhook_attempts) for row in connection.execute(query)]

    def settle(self, notice: Notice) -> None:
        """It was delivered, or given up: never try it again."""
        self._update(notice, webhook_at=None)

    def postpone(self, notice: Notice, *, delay_s: float) -> None:
        """It failed: try again in `delay_s`."""
        self._update(notice, webhook_at=self._database.now + delay_s)

    def _update(self, notice: Notice, *, webhook_at: sa.ColumnElement[float] | None) -> None:
        spec = notice.job.spec
        change = sa.update(JOBS).where(
            _jobs.contract == spec.contract, _jobs.id == spec.id, _jobs.webhook_attempts == notice.num_failures
        )
        with self._database.writing() as connection:
            connection.execute(change.values(webhook_at=webhook_at, webhook_attempts=notice.num_failures + 1))
