"""Dead letters: jobs that failed in all attempts because of the server. Operators list, retry and delete them.

A dead letter is identified by a number, its position in the order in which all jobs arrived. Job ids do not suffice:
they are unique only among the jobs of one client in one contract. The methods block, so call them from worker threads.
Every method raises StorageError.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from stable_audio_serve.core.ids import ArtifactKey
from stable_audio_serve.jobs.job import Job, JobEvent, JobRef
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.retention import unreferenced
from stable_audio_serve.jobs.store.rows import is_job, to_event, to_job
from stable_audio_serve.jobs.store.tables import EVENTS, IS_DEAD, JOBS, SECTIONS
from stable_audio_serve.jobs.store.transitions import Transitions, requeued

_RETRIED = "tried again by an operator"

_jobs = JOBS.c


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A dead letter: the failed job, and the number that identifies it."""

    number: int
    job: Job


class DeadLetters:
    """The dead letters of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._transitions = Transitions(database)

    def page(self, *, before: int | None = None, model: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        """Return up to `limit` dead letters, newest first.

        If `model` is given, all returned jobs are of this model. If `before` is given, all returned numbers are lower.
        """
        query = sa.select(JOBS).where(IS_DEAD).order_by(_jobs.seq.desc()).limit(limit)
        if before is not None:
            query = query.where(_jobs.seq < before)
        if model is not None:
            query = query.where(_jobs.model == model)
        with self._database.reading() as connection:
            return [DeadLetter(row.seq, to_job(row)) for row in connection.execute(query)]

    def find(self, number: int) -> tuple[DeadLetter, Sequence[JobEvent]] | None:
        """Return the dead letter with this number and the events of its job, or None if there is none."""
        query = sa.select(JOBS).where(IS_DEAD, _jobs.seq == number)
        events = sa.select(EVENTS).where(EVENTS.c.job == number).order_by(EVENTS.c.id)
        with self._database.reading() as connection:
            row = connection.execute(query).first()
            if row is None:
                return None
            rows = connection.execute(events).all()
        return DeadLetter(row.seq, to_job(row)), [to_event(event, at) for at, event in enumerate(rows, start=1)]

    def retry(self, numbers: Collection[int]) -> Sequence[int]:
        """Requeue the dead letters with these numbers, if they exist. Their attempts count from 0 again.

        Returns the numbers of the requeued dead letters.
        """
        with self._database.writing() as connection:
            found = self._lock(connection, numbers)
            if not found:
                return []
            change = sa.update(JOBS).where(_jobs.seq.in_(found)).values(self._requeued()).returning(JOBS)
            self._transitions.add_events(connection, connection.execute(change).all(), message=_RETRIED)
            return found

    def retry_job(self, ref: JobRef) -> Job | None:
        """Requeue the job if it is a dead letter, and return it. Returns None if the job is no dead letter."""
        with self._database.writing() as connection:
            conditions = (is_job(ref), _jobs.is_dead_letter)
            return self._transitions.change(connection, *conditions, message=_RETRIED, **self._requeued())

    def delete(self, numbers: Collection[int]) -> tuple[Sequence[int], Sequence[ArtifactKey]]:
        """Delete the dead letters with these numbers, if they exist.

        Returns the numbers of the deleted dead letters, and the keys of their uploads and finished sections that no
        other job refers to. The caller should delete these files.
        """
        with self._database.writing() as connection:
            found = self._lock(connection, numbers)
            sections = connection.execute(sa.select(SECTIONS.c.key).where(SECTIONS.c.job.in_(found))).scalars().all()
            delete = sa.delete(JOBS).where(_jobs.seq.in_(found)).returning(_jobs.upload_key)
            keys = [key for key in (*connection.execute(delete).scalars(), *sections) if key is not None]
            return found, unreferenced(connection, list(dict.fromkeys(keys)))

    def _lock(self, connection: sa.Connection, numbers: Collection[int]) -> Sequence[int]:
        """Lock the rows of the dead letters with these numbers. Returns the numbers that exist, sorted."""
        query = sa.select(_jobs.seq).where(IS_DEAD, _jobs.seq.in_(numbers)).order_by(_jobs.seq).with_for_update()
        return connection.execute(query).scalars().all()

    def _requeued(self) -> dict[str, Any]:
        return requeued() | {
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
