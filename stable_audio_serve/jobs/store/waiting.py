"""The waiting work of each model, which autoscaling uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import sqlalchemy as sa

from stable_audio_serve.core.pricing import WorkSize
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.tables import JOBS, WORK, in_state

_SUMS = (sa.func.sum(JOBS.c[column]).label(name) for column, name in WORK.items())
_QUERY = (
    sa.select(JOBS.c.model, sa.func.count().label("num_jobs"), *_SUMS).where(in_state("queued")).group_by(JOBS.c.model)
)


@dataclass(frozen=True, slots=True)
class Waiting:
    """The number and total work of one model's jobs that no runner has started."""

    num_jobs: int = 0
    size: WorkSize = field(default_factory=WorkSize)


class WaitingWork:
    """Waiting work in one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def by_model(self) -> Mapping[str, Waiting]:
        """Return the waiting work of each model that has any. Reads only an index with one entry per waiting job."""
        with self._database.reading() as connection:
            return {model: Waiting(number, WorkSize(*sizes)) for model, number, *sizes in connection.execute(_QUERY)}
