"""How much work waits in the queue, for those who decide how many replicas there should be."""

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
    """Jobs of one model that no runner has started, and the size of all together."""

    num_jobs: int = 0
    size: WorkSize = field(default_factory=WorkSize)


class WaitingWork:
    """What waits in one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def by_model(self) -> Mapping[str, Waiting]:
        """Returns it for each model that has any. Reads an index with an entry for every waiting job, and no table."""
        with self._database.reading() as connection:
            return {model: Waiting(number, WorkSize(*sizes)) for model, number, *sizes in connection.execute(_QUERY)}
