"""Jobs that used up their attempts through no fault of their own: what operators may do with them.

Each is known by its number, its place in the order of arrival: ids are unique only per client and contract.
Blocking: for worker threads. Every method raises StorageError. Knows no files: deleting those is the caller's.
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
from stable_audio_serve.jobs.store.transitions import Transitions, waiting_again

_RETRIED = "tried again by an operator"

_jobs = JOBS.c


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A job that was given up, and its number."""

    number: int
    job: Job


class DeadLetters:
    """The dead letters in one database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._transitions = Transitions(database)

    def count(self) -> int:
        """Returns how many there are."""
        query = sa.select(sa.func.count()).select_from(JOBS).where(IS_DEAD)
        with self._database.reading() as connection:
            return connection.execute(query).scalar_one()

    def page(self, *, before: int | None = None, model: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        """Returns up to `limit` of them, newest first: those with numbers below `before`, of one model or of all."""
        query = sa.select(JOBS).where(IS_DEAD).order_by(_jobs.seq.desc()).limit(limit)
        if before is not None:
            query = query.where(_jobs.seq < before)
        if model is not None:
            query = query.where(_jobs.model == model)
        with self._database.reading() as connection:
            return [DeadLetter(row.seq, to_job(row)) for row in connection.execute(query)]

    def find(self, number: int) -> tuple[DeadLetter, Sequence[JobEvent]] | None:
        """Returns one and what happened to it, None when there is none of this number."""
        query = sa.select(JOBS).where(IS_DEAD, _jobs.seq == number)
        events = sa.select(EVENTS).where(EVENTS.c.job == number).order_by(EVENTS.c.id)
        with self._database.reading() as connection:
            row = connection.execute(query).first()
            if row is None:
                return None
            told = connection.execute(events).all()
        return DeadLetter(row.seq, to_job(row)), [to_event(event, at) for at, event in enumerate(told, start=1)]

    def retry(self, numbers: Collection[int]) -> Sequence[int]:
        """Put dead letters back into the queue with no attempts counted. Returns their numbers."""
        with self._database.writing() as connection:
            found = self._lock(connection, numbers)
            if not found:
                return []
            change = sa.update(JOBS).where(_jobs.seq.in_(found)).values(self._waiting_again()).returning(JOBS)
            self._transitions.note(connection, connection.execute(change).all(), message=_RETRIED)
            return found

    def retry_job(self, ref: JobRef) -> Job | None:
        """`retry` for a job known by its id. Returns None when it is no dead letter."""
        with self._database.writing() as connection:
            conditions = (is_job(ref), _jobs.is_dead_letter)
            return self._transitions.change(connection, *conditions, message=_RETRIED, **self._waiting_again())

    def delete(self, numbers: Collection[int]) -> tuple[Sequence[int], Sequence[ArtifactKey]]:
        """Forget dead letters. Returns the numbers of those it forgot, and keys of files now unreferenced."""
        with self._database.writing() as connection:
            found = self._lock(connection, numbers)
            delete = sa.delete(JOBS).where(_jobs.seq.in_(found)).returning(_jobs.upload_key)
            keys = [key for key in connection.execute(delete).scalars() if key is not None]
            return found, unreferenced(connection, list(dict.fromkeys(keys)))

    def _lock(self, connection: sa.Connection, numbers: Collection[int]) -> Sequence[int]:
        """Returns those of the numbers that are dead letters', in order; no other transaction changes them now."""
        query = sa.select(_jobs.seq).where(IS_DEAD, _jobs.seq.in_(numbers)).order_by(_jobs.seq).with_for_update()
        return connection.execute(query).scalars().all()

    def _waiting_again(self) -> dict[str, Any]:
        return waiting_again() | {
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
