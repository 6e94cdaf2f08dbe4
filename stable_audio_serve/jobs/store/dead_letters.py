"""Dead letters: jobs that failed in all attempts through no fault of their own. Operators list, retry and delete them.

Each dead letter has a number, its position in order of arrival, because ids are unique only per client and contract.
Blocking: call from worker threads. Every method raises StorageError. The caller deletes files.
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
from stable_audio_serve.jobs.store.tables import EVENTS, IS_DEAD, JOBS
from stable_audio_serve.jobs.store.transitions import Transitions, requeued

_RETRIED = "tried again by an operator"

_jobs = JOBS.c


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A dead letter and its number."""

    number: int
    job: Job


class DeadLetters:
    """The dead letters of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._transitions = Transitions(database)

    def count(self) -> int:
        query = sa.select(sa.func.count()).select_from(JOBS).where(IS_DEAD)
        with self._database.reading() as connection:
            return connection.execute(query).scalar_one()

    def page(self, *, before: int | None = None, model: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        """Return up to `limit` dead letters, newest first, of `model` (None: any) and numbered below `before`."""
        query = sa.select(JOBS).where(IS_DEAD).order_by(_jobs.seq.desc()).limit(limit)
        if before is not None:
            query = query.where(_jobs.seq < before)
        if model is not None:
            query = query.where(_jobs.model == model)
        with self._database.reading() as connection:
            return [DeadLetter(row.seq, to_job(row)) for row in connection.execute(query)]

    def find(self, number: int) -> tuple[DeadLetter, Sequence[JobEvent]] | None:
        """Return a dead letter with its events, None if the number does not exist."""
        query = sa.select(JOBS).where(IS_DEAD, _jobs.seq == number)
        events = sa.select(EVENTS).where(EVENTS.c.job == number).order_by(EVENTS.c.id)
        with self._database.reading() as connection:
            row = connection.execute(query).first()
            if row is None:
                return None
            rows = connection.execute(events).all()
        return DeadLetter(row.seq, to_job(row)), [to_event(event, at) for at, event in enumerate(rows, start=1)]

    def retry(self, numbers: Collection[int]) -> Sequence[int]:
        """Requeue dead letters, with their attempts reset to 0. Returns the numbers of the requeued dead letters."""
        with self._database.writing() as connection:
            found = self._lock(connection, numbers)
            if not found:
                return []
            change = sa.update(JOBS).where(_jobs.seq.in_(found)).values(self._requeued()).returning(JOBS)
            self._transitions.add_events(connection, connection.execute(change).all(), message=_RETRIED)
            return found

    def retry_job(self, ref: JobRef) -> Job | None:
        """Requeue the dead letter with this job id. Returns None if it does not exist."""
        with self._database.writing() as connection:
            conditions = (is_job(ref), _jobs.is_dead_letter)
            return self._transitions.change(connection, *conditions, message=_RETRIED, **self._requeued())

    def delete(self, numbers: Collection[int]) -> tuple[Sequence[int], Sequence[ArtifactKey]]:
        """Delete dead letters. Returns the numbers of the deleted dead letters, and the keys of their unreferenced
        files.
        """
        with self._database.writing() as connection:
            found = self._lock(connection, numbers)
            delete = sa.delete(JOBS).where(_jobs.seq.in_(found)).returning(_jobs.upload_key)
            keys = [key for key in connection.execute(delete).scalars() if key is not None]
            return found, unreferenced(connection, list(dict.fromkeys(keys)))

    def _lock(self, connection: sa.Connection, numbers: Collection[int]) -> Sequence[int]:
        """Lock the dead letters among `numbers` against other transactions and return their numbers, sorted."""
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
