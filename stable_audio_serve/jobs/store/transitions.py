"""State transitions of jobs. Each is a compare-and-set in SQL and adds an event, in the caller's transaction.

The condition of a transition contains the state and the lease that the job must have before. Therefore only one of two
concurrent transitions succeeds.
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

# A job that starts again keeps the progress of its finished sections.
_KEPT_FRACTION = sa.case((_jobs.num_sections > 0, _jobs.fraction), else_=0.0)


class Transitions:
    """Changes the states of jobs in one database."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._insert_events = sa.insert(EVENTS).values(at=database.now)

    def change(
        self, connection: sa.Connection, *conditions: sa.ColumnElement[bool], message: str | None, **values: Any
    ) -> Job | None:
        """Set the columns `values` of the job that meets all `conditions`, and add an event with `message`.

        Returns the changed job, or None if no job meets the conditions.
        """
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
        """Change up to `limit` jobs that meet all `conditions`, like `change`. Returns them in order of arrival.

        Jobs that another transaction has locked are left out.
        """
        some = sa.select(_jobs.seq).where(*conditions).limit(limit).with_for_update(skip_locked=True)
        found = connection.execute(some).scalars().all()
        if not found:
            return []
        change = sa.update(JOBS).where(_jobs.seq.in_(found)).values(values).returning(JOBS)
        rows = sorted(connection.execute(change), key=lambda row: row.seq)
        self.add_events(connection, rows, message=message)
        return [to_job(row) for row in rows]

    def add_events(self, connection: sa.Connection, rows: Iterable[sa.Row[Any]], *, message: str | None) -> None:
        """Add an event with `message` to the job in each of these rows."""
        names = ("stage", "fraction", "eta_s", "num_sections")
        events = [{"job": row.seq, "message": message} | {name: row._mapping[name] for name in names} for row in rows]
        connection.execute(self._insert_events, events)

    def started(self, owner: str, *, lease_s: float) -> dict[str, Any]:
        """Return the columns to set when a job is leased to the runner `owner`."""
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
            "fraction": _KEPT_FRACTION,
            "eta_s": None,
            "engine_position": None,
        }

    def ended(self, state: State, error: JobError | None = None) -> dict[str, Any]:
        """Return the columns to set when a job ends. If the job has a webhook, the webhook is due at once."""
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
    """Return the columns to set when a job is requeued. The job stays ahead of its client's later jobs."""
    return {
        "state": "queued",
        "owner": None,
        "lease_until": None,
        "started_at": None,
        "eta_s": None,
        "stage": "queued",
        "fraction": _KEPT_FRACTION,
        "engine_position": None,
    }
