"""State transitions of jobs. Each is a compare-and-set in SQL and adds an event, in the caller's transaction.

A transition names the state and lease that it starts from, so only one of two concurrent transitions succeeds.
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
    """State transitions in one database."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._insert_events = sa.insert(EVENTS).values(at=database.now)

    def change(
        self, connection: sa.Connection, *conditions: sa.ColumnElement[bool], message: str | None, **values: Any
    ) -> Job | None:
        """Apply `values` to the job that meets all `conditions`. Returns the changed job, None if none meets them."""
        row = connection.execute(sa.update(JOBS).where(*conditions).values(values).returning(JOBS)).first()
        if row is None:
            return None
        self.add_events(connection, [row], message=message)
        return to_job(row)

    def change_some(
        self,
        connection: sa.Connection,
        *conditions: sa.ColumnElement[bool],
        limit: int,
        message: str | None,
        **values: Any,
    ) -> list[Job]:
        """Change up to `limit` jobs that no other transaction has locked. Returns them in order of arrival."""
        some = sa.select(_jobs.seq).where(*conditions).limit(limit).with_for_update(skip_locked=True)
        found = connection.execute(some).scalars().all()
        if not found:
            return []
        change = sa.update(JOBS).where(_jobs.seq.in_(found)).values(values).returning(JOBS)
        rows = sorted(connection.execute(change), key=lambda row: row.seq)
        self.add_events(connection, rows, message=message)
        return [to_job(row) for row in rows]

    def add_events(self, connection: sa.Connection, rows: Iterable[sa.Row[Any]], *, message: str | None) -> None:
        """Add an event for each of these rows."""
        events = [
            {"job": row.seq, "stage": row.stage, "fraction": row.fraction, "eta_s": row.eta_s, "message": message}
            for row in rows
        ]
        connection.execute(self._insert_events, events)

    def started(self, owner: str, *, lease_s: float) -> dict[str, Any]:
        """Return the column values of a job that is leased."""
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
        """Return the column values of a job that ends. Its webhook, if any, is due at once."""
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


def requeued() -> dict[str, Any]:
    """Return the column values of a job that is requeued. It keeps its place in the queue."""
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
