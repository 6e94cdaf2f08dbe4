"""Changing jobs from one state to another: compare-and-set in SQL, each with its event, in the caller's transaction.

A change names the states and leases it starts from, so of two at once only one happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, TypeVar

import sqlalchemy as sa

from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.jobs.job import Job, JobError, JobEvent, JobRef, JobSpec, Lease, State
from stable_audio_serve.jobs.store import codec
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.tables import EVENTS, JOBS, in_state

T = TypeVar("T")

CANCELLED = JobError("cancelled", "the job was cancelled")

_jobs = JOBS.c


class Transitions:
    """Changes on one database."""

    def __init__(self, database: Database) -> None:
        """Touches nothing yet."""
        self.database = database
        self._insert_events = sa.insert(EVENTS).values(at=database.now)

    def change(
        self, connection: sa.Connection, *conditions: sa.ColumnElement[bool], message: str | None, **values: Any
    ) -> Job | None:
        """Apply `values` to the one job that meets all `conditions`; the job afterwards, None when none does."""
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
        """`change` for up to `limit` jobs that nobody else is changing at this moment, in order of arrival."""
        some = sa.select(_jobs.seq).where(*conditions).limit(limit).with_for_update(skip_locked=True)
        found = connection.execute(some).scalars().all()
        if not found:
            return []
        change = sa.update(JOBS).where(_jobs.seq.in_(found)).values(values).returning(JOBS)
        rows = sorted(connection.execute(change), key=lambda row: row.seq)
        self.note(connection, rows, message=message)
        return [to_job(row) for row in rows]

    def note(self, connection: sa.Connection, rows: Iterable[sa.Row[Any]], *, message: str | None) -> None:
        """An event for each of these rows of jobs."""
        events = [
            {"job": row.seq, "stage": row.stage, "fraction": row.fraction, "eta_s": row.eta_s, "message": message}
            for row in rows
        ]
        connection.execute(self._insert_events, events)

    def started(self, owner: str, *, lease_s: float) -> dict[str, Any]:
        """What changes when a job is leased."""
        now = self.database.now
        return {
            **{"state": "running", "owner": owner, "fence": _jobs.fence + 1, "lease_until": now + lease_s},
            **{"attempts": _jobs.attempts + 1, "started_at": now, "start_before": None},
            **{"stage": "started", "fraction": 0.0, "eta_s": None, "engine_position": None},
        }

    def ended(self, state: State, error: JobError | None = None) -> dict[str, Any]:
        """What changes when a job ends; whoever wants to hear of it is to be told now."""
        now = self.database.now
        return {
            **{"state": state, "completed_at": now, "owner": None, "lease_until": None, "start_before": None},
            **{"eta_s": None, "engine_position": None, "error": None if error is None else codec.dump(error)},
            "webhook_at": sa.case((_jobs.webhook_url.is_not(None), now)),
        }


def waiting_again() -> dict[str, Any]:
    """What changes when a job goes back to wait; its turn stays."""
    return {
        **{"state": "queued", "owner": None, "lease_until": None, "started_at": None, "eta_s": None},
        **{"stage": "queued", "fraction": 0.0, "engine_position": None},
    }


def is_job(ref: JobRef) -> sa.ColumnElement[bool]:
    """That it is this job."""
    return sa.and_(_jobs.contract == ref.contract, _jobs.client == ref.client, _jobs.id == ref.id)


def is_held(job: Job) -> sa.ColumnElement[bool]:
    """That it is this job, and still under the lease it had."""
    lease = job.lease or Lease("", -1)
    return sa.and_(is_job(job.spec.ref), in_state("running"), _jobs.owner == lease.owner, _jobs.fence == lease.fence)


def to_job(row: sa.Row[Any]) -> Job:
    """The job in a row of the table, also when this version cannot read all of it: it must not hold up others."""
    spec = _read(codec.load_spec, row.spec)
    return Job(
        spec=spec or _outline(row),
        state=row.state,
        created_at=datetime.fromtimestamp(row.created_at, UTC),
        started_at=_to_time(row.started_at),
        completed_at=_to_time(row.completed_at),
        attempts=row.attempts,
        cancel_requested=row.cancel_requested,
        stage=row.stage,
        fraction=row.fraction,
        eta_s=row.eta_s,
        engine_position=row.engine_position,
        lease=None if row.owner is None else Lease(row.owner, row.fence),
        is_dead_letter=row.is_dead_letter,
        result=_read(codec.load_result, row.result),
        error=_read(codec.load_error, row.error),
        is_readable=spec is not None,
    )


def _read(load: Callable[[str], T], text: str | None) -> T | None:
    """None for nothing and for what another version of this package wrote."""
    try:
        return None if text is None else load(text)
    except ValueError:
        return None


def _outline(row: sa.Row[Any]) -> JobSpec:
    """What is known of a job without its specification."""
    return JobSpec(
        id=row.id,
        contract=row.contract,
        model=row.model,
        mode="text-to-audio",
        request=GenerationRequest(prompt="", duration_s=0.0, seed=0, priority=row.priority),
        webhook_url=row.webhook_url,
        client=row.client,
        id_is_chosen=row.id_is_chosen,
        idempotency_key=row.idempotency_key,
        fingerprint=row.fingerprint,
    )


def to_event(row: sa.Row[Any], number: int) -> JobEvent:
    """The event in a row of the table, the job's `number`th: what numbers the events of all jobs have is nobody's."""
    at = datetime.fromtimestamp(row.at, UTC)
    return JobEvent(number, at, row.stage, row.fraction, row.eta_s, row.message)


def _to_time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
