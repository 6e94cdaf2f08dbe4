"""Job operations for clients: submit, read, cancel. Each client sees only its own jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from stable_audio_serve.core.catalog import ModelCard, ModelCatalog
from stable_audio_serve.core.errors import (
    ConflictError,
    InvalidRequestError,
    OverloadedError,
    QuotaError,
    StableAudioError,
    StorageError,
)
from stable_audio_serve.core.ids import ClientId, JobId
from stable_audio_serve.core.pricing import WorkSize
from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs.job import Contract, Job, JobEvent, JobRef, JobSpec, State, host_of
from stable_audio_serve.jobs.pieces.sections import sizes_of
from stable_audio_serve.jobs.store import codec
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.rows import IS_JOB, is_job, to_event, to_job
from stable_audio_serve.jobs.store.tables import EVENTS, JOBS, WAITING, WORK, count
from stable_audio_serve.jobs.store.transitions import CANCELLED, Transitions
from stable_audio_serve.jobs.store.turns import Turns

CancelOutcome = Literal["removed", "requested", "already_over", "unknown"]

_ADD_LOCK = 0x53415502  # number of a PostgreSQL advisory lock, which no other lock in the database has
_MAX_ID = 2**63 - 1
_FULL_RETRY_S = 10.0
_MOST_OVER = 2  # a full queue accepts jobs of some clients, until it is this many times as long as `max_queued`

_jobs = JOBS.c

# Built once, because building a statement takes longer than running it.
_JOB = sa.select(JOBS).where(IS_JOB)
_EVENTS = (
    sa.select(EVENTS)
    .join(JOBS, _jobs.seq == EVENTS.c.job)
    .where(IS_JOB)
    .order_by(EVENTS.c.id)
    .offset(sa.bindparam("num_known"))
)
_WAITING = sa.select(count(WAITING).label("all"), sa.literal(0).label("own"))
_WAITING_AND_OWN = sa.select(
    count(WAITING).label("all"), count(WAITING, _jobs.client == sa.bindparam("client")).label("own")
)
_CLIENTS = sa.select(sa.func.count()).select_from(
    sa.select(_jobs.client).where(WAITING).group_by(_jobs.client).subquery()
)


@dataclass(frozen=True, slots=True)
class Added:
    """The stored job of a submission. `is_new` is False if an earlier submission of the same request added it."""

    job: Job
    is_new: bool


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list of jobs, newest first. `next_cursor` leads to the next page; None = there is none."""

    jobs: tuple[Job, ...]
    next_cursor: str | None


class ClientJobs:
    """The operations of clients on one job database."""

    def __init__(self, database: Database, limits: JobSettings, *, catalog: ModelCatalog | None = None) -> None:
        self._database = database
        self._catalog = catalog
        self._limits = limits
        self._transitions = Transitions(database)
        self._turns = Turns(database)
        now, start_within_s = database.now, sa.bindparam("start_within_s", type_=sa.Double)
        times = {"created_at": now, "not_before": now, "start_before": now + start_within_s}
        insert = database.insert(JOBS).values(state="queued", **times).on_conflict_do_nothing()
        self._insert_job = insert.returning(JOBS)  # built once, because building it takes longer than running it

    def add_all(self, specs: Sequence[JobSpec]) -> list[Added | StableAudioError]:
        """Add several jobs in one transaction. Returns the stored job of each submission, or why it is refused.

        If an earlier submission of the same request added a job, it is that job. The error is ConflictError if the
        idempotency key or the id was used for a different request, and QuotaError or OverloadedError if too many jobs
        are waiting.
        """
        # Without the lock, two transactions at once could each see room for a job, and together exceed a limit.
        with self._database.writing_alone(_ADD_LOCK) as connection:
            return [self._add(connection, spec) for spec in specs]

    def get(self, ref: JobRef) -> Job | None:
        return self._find(_JOB, ref._asdict())

    def find_same(self, spec: JobSpec) -> Job | None:
        """Return the job that an earlier submission of this request added, or None. Raises ConflictError."""
        with self._database.reading() as connection:
            row = _find_same(connection, spec)
        return None if row is None else to_job(row)

    def find_unguessable(self, contract: Contract, job_id: JobId) -> Job | None:
        """Return the job with this id, whichever client it belongs to. For links that work without a key.

        Returns None if the job's client chose the id, because others could guess it.
        """
        is_ours = _jobs.id_is_chosen == sa.false()
        return self._find(sa.select(JOBS).where(_jobs.contract == contract, _jobs.id == job_id, is_ours))

    def list_own(
        self,
        contract: Contract,
        client: ClientId,
        *,
        state: State | None = None,
        cursor: str | None = None,
        limit: int = 20,
    ) -> Page:
        """Return a page of a client's jobs, newest first.

        Raises InvalidRequestError if `cursor` is not from a page of this client's jobs, or if the last job of that page
        was deleted.
        """
        conditions = [_jobs.contract == contract, _jobs.client == client]
        if state is not None:
            conditions.append(_jobs.state == state)
        with self._database.reading() as connection:
            if cursor is not None:  # the cursor is the id of the last job on the previous page
                last = is_job(JobRef(contract, client, JobId(cursor)))
                seq = connection.execute(sa.select(_jobs.seq).where(last)).scalar()
                if seq is None:
                    message = "cursor: unknown, or its job was deleted"
                    raise InvalidRequestError(message, field="cursor")
                conditions.append(_jobs.seq < seq)
            query = sa.select(JOBS).where(*conditions).order_by(_jobs.seq.desc()).limit(limit + 1)
            rows = connection.execute(query).all()
        jobs = tuple(to_job(row) for row in rows[:limit])
        return Page(jobs, jobs[-1].spec.id if len(rows) > limit else None)

    def events(self, ref: JobRef, *, after: int = 0) -> tuple[JobEvent, ...]:
        """Return the job's events with an id above `after`, in order."""
        num_known = min(max(after, 0), _MAX_ID)
        with self._database.reading() as connection:
            rows = connection.execute(_EVENTS, {**ref._asdict(), "num_known": num_known}).all()
        return tuple(to_event(row, number) for number, row in enumerate(rows, start=num_known + 1))

    def position(self, job: Job) -> int:
        """Return how many queued jobs of the same model and priority will start before this job."""
        with self._database.reading() as connection:
            return self._turns.position(connection, job.spec)

    def cancel(self, ref: JobRef) -> tuple[CancelOutcome, Job | None]:
        """Cancel a job: end it if it is queued, or ask its runner to stop it if it is running.

        Returns the outcome, and the job as it is afterwards.
        """
        is_it = is_job(ref)
        with self._database.writing() as connection:
            row = connection.execute(sa.select(JOBS).where(is_it).with_for_update()).first()
            if row is None:
                return "unknown", None
            if row.state == "queued":
                values = self._transitions.ended("cancelled", CANCELLED)
                return "removed", self._transitions.change(connection, is_it, message="cancelled", **values)
            if row.state != "running":
                return "already_over", to_job(row)
            if row.cancel_requested:
                return "requested", to_job(row)
            message = "cancellation requested"
            return "requested", self._transitions.change(connection, is_it, message=message, cancel_requested=True)

    def _find(self, query: sa.Select[Any], values: Mapping[str, str] | None = None) -> Job | None:
        with self._database.reading() as connection:
            row = connection.execute(query, values).first()
        return None if row is None else to_job(row)

    def _add(self, connection: sa.Connection, spec: JobSpec) -> Added | StableAudioError:
        refusal = _find_no_room(connection, spec, limits=self._limits)
        if refusal is None and (row := self._insert(connection, spec)):
            self._turns.join(connection, spec)
            self._transitions.add_events(connection, [row], message="queued")
            return Added(to_job(row), is_new=True)
        try:
            earlier = _find_same(connection, spec)
        except ConflictError as error:
            return error
        if earlier is not None:
            return Added(to_job(earlier), is_new=False)
        # The insert found a job with the same id or idempotency key, but that job was deleted before it could be read.
        return refusal or StorageError(
            "the job of an earlier request was just deleted; send the request again", retry_after_s=0
        )

    def _insert(self, connection: sa.Connection, spec: JobSpec) -> sa.Row[Any] | None:
        """Insert the job and return its row. Returns None if the id or the idempotency key is in use."""
        values = {
            "contract": spec.contract,
            "id": spec.id,
            "client": spec.client,
            "id_is_chosen": spec.id_is_chosen,
            "model": spec.model,
            "priority": spec.request.priority,
            "spec": codec.dump(spec),
            "fingerprint": spec.fingerprint,
            "idempotency_key": spec.idempotency_key,
            "start_within_s": spec.start_within_s,
            "upload_key": spec.upload.file.key if spec.upload else None,
            "webhook_url": spec.webhook_url,
            "webhook_host": host_of(spec.webhook_url) if spec.webhook_url else None,
        }
        size = _size_of(spec, self._catalog)
        values |= {column: getattr(size, name) for column, name in WORK.items()}
        return connection.execute(self._insert_job, values).first()


def _size_of(spec: JobSpec, catalog: ModelCatalog | None) -> WorkSize:
    card = catalog.find(spec.model) if catalog is not None else ModelCard(spec.model, family="")
    return WorkSize.sum(sizes_of(spec, model=card))


def _find_no_room(connection: sa.Connection, spec: JobSpec, *, limits: JobSettings) -> OverloadedError | None:
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


def _find_same(connection: sa.Connection, spec: JobSpec) -> sa.Row[Any] | None:
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
