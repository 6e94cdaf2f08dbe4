"""The order in which queued jobs start.

For each model and priority, the clients take turns, one job each: the next job is from the client whose last job
started longest ago. A client's own jobs start in order of arrival. So a client without queued jobs that submits a job
waits for at most one job of each other client.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import sqlalchemy as sa

from stable_audio_serve.core.generation import Priority
from stable_audio_serve.jobs.job import JobSpec
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.rows import IS_JOB
from stable_audio_serve.jobs.store.tables import JOBS, TURNS, in_state, storable

_jobs, _turns = JOBS.c, TURNS.c
_QUEUED = in_state("queued")
_IS_WAITING = sa.and_(
    _QUEUED, _jobs.priority == _turns.priority, _jobs.model == _turns.model, _jobs.client == _turns.client
)
_ORDER = (_turns.served, _turns.seq)
LEFT_TO_OTHERS_S = 3600.0
# The longest delay of a requeued job. A job that seems due later was added before the clock was set back, and is due.
LONGEST_DELAY_S = 900.0


class Turns:
    """The clients' turns in one database. Every method is one SQL statement in the caller's transaction."""

    def __init__(self, database: Database) -> None:
        self._now = database.now
        self._join = database.insert(TURNS).on_conflict_do_nothing()

    def join(self, connection: sa.Connection, spec: JobSpec) -> None:
        """Add the client of a new job to the clients that take turns, unless it is among them already."""
        values = {"priority": spec.request.priority, "model": spec.model, "client": spec.client}
        connection.execute(self._join, values)

    def next_job(
        self,
        priority: Priority,
        models: Collection[str] | None,
        *,
        known: Collection[str] | None = None,
        without: Collection[tuple[str, str]] = (),
    ) -> sa.ScalarSelect[int]:
        """Return an SQL subquery for the column `seq` of the next job of these models. It locks the row of the job.

        If `models` is None, any model will do. A job of a model that is not in `known` is left to other servers that
        share the database for `LEFT_TO_OTHERS_S`. `without` lists models and clients to leave out. The result is NULL
        if no job is due, or all due jobs are locked.
        """
        now = self._now
        is_due = [
            sa.or_(_jobs.not_before <= now, _jobs.not_before > now + LONGEST_DELAY_S),
            sa.or_(_jobs.start_before.is_(None), _jobs.start_before > now),
        ]
        if known is not None:
            is_due.append(sa.or_(_jobs.model.in_(known), _jobs.created_at <= now - LEFT_TO_OTHERS_S))
        first = sa.select(_jobs.seq).where(_IS_WAITING, *is_due).order_by(_jobs.seq).limit(1)
        first = first.with_for_update(skip_locked=True).correlate(TURNS)
        # The database goes through the clients in order, and stops at the first one with a job that is due. Without
        # `offset(0)`, it would run the subquery `first` twice, for the condition and for the result.
        heads = sa.select(first.scalar_subquery().label("seq")).where(_turns.priority == priority)
        if models is not None:
            heads = heads.where(_turns.model.in_(models))
        if without:
            left_out = [(model, storable(client)) for model, client in without]
            heads = heads.where(sa.tuple_(_turns.model, _turns.client).not_in(left_out))
        in_turn = heads.order_by(*_ORDER).offset(0).subquery()
        return sa.select(in_turn.c.seq).where(in_turn.c.seq.is_not(None)).limit(1).scalar_subquery()

    def served(self, connection: sa.Connection, spec: JobSpec) -> None:
        """Record that a job of this client has started, so that the turns of all other clients come next."""
        priority = spec.request.priority
        others = TURNS.alias()
        latest = sa.select(sa.func.max(others.c.served)).where(others.c.priority == priority).scalar_subquery()
        is_it = (_turns.priority == priority, _turns.model == spec.model, _turns.client == spec.client)
        connection.execute(sa.update(TURNS).where(*is_it).values(served=latest + 1))

    def position(self, connection: sa.Connection, spec: JobSpec) -> int:
        """Return how many queued jobs of the same model and priority will start before this job.

        Counts the client's own earlier jobs, and the jobs of other clients whose turns come before the turn of this
        job.
        """
        values = {"priority": spec.request.priority, "model": spec.model, **spec.ref._asdict()}
        lines = {row.client: row for row in connection.execute(_LINES, values)}
        mine = lines.pop(storable(spec.client), None)
        if mine is None:
            return 0
        place = (mine.served, mine.seq)
        return mine.earlier + sum(
            min(line.waiting, mine.earlier + ((line.served, line.seq) < place)) for line in lines.values()
        )


def _select_lines() -> sa.Select[Any]:
    """Return a query for the clients that have queued jobs of a model and priority: how many, and the client's turn.

    Also counts those that are older than one job. The query's parameters name the model, the priority and this job.
    """
    line: dict[str, sa.BindParameter[str]] = {name: sa.bindparam(name) for name in ("priority", "model")}
    own = sa.select(_jobs.seq).where(IS_JOB).correlate(None).scalar_subquery()
    counts = (
        sa.select(
            _jobs.client,
            sa.func.count().label("waiting"),
            sa.func.sum(sa.case((_jobs.seq < own, 1), else_=0)).label("earlier"),
        )
        .where(_QUEUED, *(_jobs[name] == value for name, value in line.items()))
        .group_by(_jobs.client)
        .subquery()
    )
    of_line = [_turns[name] == value for name, value in line.items()]
    return sa.select(counts, *_ORDER).join(TURNS, sa.and_(*of_line, _turns.client == counts.c.client))


_LINES = _select_lines()  # built once, because building a statement takes longer than running it
