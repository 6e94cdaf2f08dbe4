"""Convert table rows to the dataclasses of `jobs.job`, and build the SQL conditions that select rows."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa

from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.jobs.job import Job, JobError, JobEvent, JobRef, JobResult, JobSpec, Lease
from stable_audio_serve.jobs.store import codec
from stable_audio_serve.jobs.store.tables import JOBS, in_state

T = TypeVar("T")

_jobs = JOBS.c

# The SQL condition for the row of the job whose `JobRef` the statement's parameters are.
IS_JOB = sa.and_(*(_jobs[name] == sa.bindparam(name) for name in JobRef._fields))


def is_job(ref: JobRef) -> sa.ColumnElement[bool]:
    """Return the SQL condition for the row of this job."""
    return sa.and_(_jobs.contract == ref.contract, _jobs.client == ref.client, _jobs.id == ref.id)


def is_held(job: Job) -> sa.ColumnElement[bool]:
    """Return the SQL condition for the row of this job if the job still runs under the lease in `job`."""
    lease = job.lease or Lease("", -1)
    return sa.and_(is_job(job.spec.ref), in_state("running"), _jobs.owner == lease.owner, _jobs.fence == lease.fence)


def to_job(row: sa.Row[Any]) -> Job:
    """Return the job in a row.

    If the stored specification cannot be parsed, the job gets a specification made from the row's columns. Raising an
    error instead would block other jobs.
    """
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
        num_sections=row.num_sections,
        lease=None if row.owner is None else Lease(row.owner, row.fence),
        is_dead_letter=row.is_dead_letter,
        result=_read(partial(codec.load, JobResult), row.result),
        error=_read(partial(codec.load, JobError), row.error),
        is_readable=spec is not None,
    )


def _read(load: Callable[[str], T], text: str | None) -> T | None:
    """Parse the text of a column. Returns None for NULL, and for text that cannot be parsed.

    Another version of this package may have written such text.
    """
    try:
        return None if text is None else load(text)
    except ValueError:
        return None


def _outline(row: sa.Row[Any]) -> JobSpec:
    """Return a specification made from the columns of a row whose stored specification cannot be parsed."""
    return JobSpec(
        id=row.id,
        contract=row.contract,
        model=row.model,
        mode="text-to-audio",
        request=GenerationRequest(prompt="", duration_s=0.0, seed=0, priority=row.priority),
        client=row.client,
        id_is_chosen=row.id_is_chosen,
    )


def to_event(row: sa.Row[Any], number: int) -> JobEvent:
    """Return the event in a row, with the id `number`: 1 for the first event of the job.

    The row's own id is not used, because it counts the events of all jobs, and clients must not know their number.
    """
    at = datetime.fromtimestamp(row.at, UTC)
    return JobEvent(number, at, row.stage, row.fraction, row.eta_s, row.message, row.num_sections)


def _to_time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
