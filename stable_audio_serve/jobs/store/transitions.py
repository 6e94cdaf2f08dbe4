"""Changes of jobs from one state to another: compare-and-set in SQL, each with its event, in the caller's transaction.

A change names the states and leases it starts from, so only one of two concurrent changes happens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa

from stable_audio_serve.jobs.job import Job, JobError, State
from stable_audio_serve.jobs.store import codec
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.rows import to_job
from stable_audio_serve.jobs.store.tables import EVENTS, JOBS

CANCELLED = JobError("cancelled", "the job was cancelled")

_jobs = JOBS.c


class Transitions:
    """Changes on one database."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._insert_events = sa.insert(EVENTS).values(at=database.now)

    def change(
        self, connection: sa.Connection, *conditions: sa.ColumnElement[bool], message: str | None, **values: Any
    ) -> Job | None:
        """Apply `values` to the one job that meets all `conditions`. Returns it afterwards, None if none does."""
        row = connection.execute(sa.update(JOBS).where(*conditions).values(values).returning(JOBS)).first()
        if row is None:
            return None
        self.note(connection, [row], message=message)
        return to_job(row)

    def change_some(
        self,
        connection: sa.Connection,
        *conditions: sa.ColumnElement[bool],
        limit: int,
        message: str | None,
        **values: Any,
    ) -> list[Job]:
        """`change` for up to `limit` jobs that no other transaction is changing. Returns them in order of arrival."""
        some = sa.select(_jobs.seq).where(*conditions).limit(limit).with_for_update(skip_locked=True)
        found = connection.execute(some).scalars().all()
        if not found:
            return []
        change = sa.update(JOBS).where(_jobs.seq.in_(found)).values(values).returning(JOBS)
        rows = sorted(connection.execute(change), key=lambda row: row.seq)
        self.note(connection, rows, message=message)
        return [to_job(row) for row in rows]

    def note(self, connection: sa.Connection, rows: Iterable[sa.Row[Any]], *, message: str | None) -> None:
        """Add an event for each of these rows of jobs."""
        events = [
            {"job": row.seq, "stage": row.stage, "fraction": row.fraction, "eta_s": row.eta_s, "message": message}
            for row in rows
        ]
        connection.execute(self._insert_events, events)

    def started(self, owner: str, *, lease_s: float) -> dict[str, Any]:
        """Returns the new values of a job that is leased."""
        now = self.database.now
        return {
            "state": "running",
            "owner": owner,
            "fence": _jobs.fence + 1,
            "lease_until": now + lease_s,
            "attempts": _jobs.attempts + 1,
            "started_at": now,
            "start_before": None,
            "stage": "started",
            "fraction": 0.0,
            "eta_s": None,
            "engine_position": None,
        }

    def ended(self, state: State, error: JobError | None = None) -> dict[str, Any]:
        """Returns the new values of a job that ends. Its webhook, if it has one, is due at once."""
        now = self.database.now
        return {
            "state": state,
            "completed_at": now,
            "owner": None,
            "lease_until": None,
            "start_before": None,
            "eta_s": None,
            "engine_position": None,
            "error": None if error is None else codec.dump(error),
            "webhook_at": sa.case((_jobs.webhook_url.is_not(None), now)),
        }


def waiting_again() -> dict[str, Any]:
    """Returns the new values of a job that goes back to the queue, where it keeps its place."""
    return {
        "state": "queued",
        "owner": None,
        "lease_until": None,
        "started_at": None,
        "eta_s": None,
        "stage": "queued",
        "fraction": 0.0,
        "engine_position": None,
    }
