"""The predicted work of the queued jobs of each model, for autoscaling."""

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
    """The number of one model's queued jobs, and the sum of their predicted work."""

    num_jobs: int = 0
    size: WorkSize = field(default_factory=WorkSize)


class WaitingWork:
    """The work of the queued jobs in one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def by_model(self) -> Mapping[str, Waiting]:
        """Return the number and the work of the queued jobs of each model. Models without queued jobs are missing.

        The query reads only an index, which has an entry for each queued job.
        """
        with self._database.reading() as connection:
            return {model: Waiting(number, WorkSize(*sizes)) for model, number, *sizes in connection.execute(_QUERY)}
