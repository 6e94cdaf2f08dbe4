"""Checks when a job is added: whether the queue has room, and whether the same request was sent before."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from stable_audio_serve.core.errors import ConflictError, OverloadedError, QuotaError
from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs.job import JobSpec
from stable_audio_serve.jobs.store.rows import is_job
from stable_audio_serve.jobs.store.tables import JOBS, count, in_state

_FULL_RETRY_S = 10.0
_MOST_OVER = 2  # a full queue accepts jobs of some clients, until it is this many times as long as `max_queued`

_jobs = JOBS.c
_QUEUED = in_state("queued")

# Built once, because building a statement takes longer than running it.
_WAITING = sa.select(count(_QUEUED).label("all"), sa.literal(0).label("own"))
_WAITING_AND_OWN = sa.select(
    count(_QUEUED).label("all"), count(_QUEUED, _jobs.client == sa.bindparam("client")).label("own")
)
_CLIENTS = sa.select(sa.func.count()).select_from(
    sa.select(_jobs.client).where(_QUEUED).group_by(_jobs.client).subquery()
)


def find_no_room(connection: sa.Connection, spec: JobSpec, *, limits: JobSettings) -> OverloadedError | None:
    """Return the error to raise if the queue has no room for a job, or None if there is room.

    A queue with `limits.max_queued` jobs is full. A full queue still accepts jobs of a client that has fewer queued
    jobs than `limits.max_queued` divided by the number of clients, until the queue is twice as long as
    `limits.max_queued`. `limits.max_queued_per_key` does not apply to a job without a client.
    """
    query = _WAITING_AND_OWN if spec.client else _WAITING
    waiting = connection.execute(query, {"client": spec.client}).one()
    if waiting.all >= limits.max_queued:
        num_clients = connection.execute(_CLIENTS).scalar_one() + (not waiting.own)
        is_fair = bool(spec.client) and waiting.own < limits.max_queued / num_clients
        if not is_fair or waiting.all >= _MOST_OVER * limits.max_queued:
            return OverloadedError("the job queue is full (jobs.max_queued)", retry_after_s=_FULL_RETRY_S)
    if waiting.own >= limits.max_queued_per_key:
        message = "too many jobs of this key are waiting (jobs.max_queued_per_key)"
        return QuotaError(message, retry_after_s=_FULL_RETRY_S)
    return None


def find_same(connection: sa.Connection, spec: JobSpec) -> sa.Row[Any] | None:
    """Return the row of the job that an earlier submission of the same request added, or None.

    Raises ConflictError if the idempotency key or the job id was used before, but for a different request.
    """
    by_key = sa.and_(
        _jobs.contract == spec.contract,
        _jobs.client == spec.client,
        _jobs.idempotency_key == spec.idempotency_key,
    )
    rows: list[sa.Row[Any]] = []
    for condition, field, used, code in (
        (by_key if spec.idempotency_key is not None else None, "Idempotency-Key", "key", "idempotency_key_reused"),
        (is_job(spec.ref), "id", "id", "id_in_use"),
    ):
        row = None if condition is None else connection.execute(sa.select(JOBS).where(condition)).first()
        if row is None:
            continue
        is_same = spec.fingerprint and row.fingerprint == spec.fingerprint
        if not is_same or any(row.seq != other.seq for other in rows):
            raise ConflictError(f"{field}: this {used} was used for another request", field=field, code=code)
        rows.append(row)
    return rows[0] if rows else None
