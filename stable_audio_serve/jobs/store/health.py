"""Health of the job database and the artifact store.

A runner that cannot store files records this in the job database, so that all processes know it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import sqlalchemy as sa

from stable_audio_serve.core.errors import StorageError, StorageFullError, StoreMovedError
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.tables import IDENTITY, JOBS, REFUSALS

StoreState = Literal["ok", "full", "moved", "unavailable"]

_refusals = REFUSALS.c


@dataclass(frozen=True, slots=True)
class StoreHealth:
    """Whether jobs can be stored and run. If not, `reason` says why. Clients may see `reason`."""

    state: StoreState = "ok"
    reason: str | None = None


def health_of(error: StorageError) -> StoreHealth:
    """Return the health of the stores that this error shows."""
    kinds: tuple[tuple[type[StorageError], StoreState], ...] = ((StorageFullError, "full"), (StoreMovedError, "moved"))
    state: StoreState = next((state for kind, state in kinds if isinstance(error, kind)), "unavailable")
    return StoreHealth(state, error.message)


class Refusals:
    """Records, in the database, which runners start no jobs because the artifact store refuses their files.

    The methods block, so call them from worker threads. Every method raises StorageError.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def record(self, owner: str, health: StoreHealth, *, for_s: float) -> None:
        """Record that the artifact store refuses files of the runner `owner`. Expires after `for_s` seconds."""
        values = {"state": health.state, "reason": health.reason, "until": self._database.now + for_s}
        insert = self._database.insert(REFUSALS).values(owner=owner, **values)
        with self._database.writing() as connection:
            connection.execute(insert.on_conflict_do_update(index_elements=[_refusals.owner], set_=values))

    def withdraw(self, owner: str) -> None:
        """Delete the record of the runner `owner`."""
        with self._database.writing() as connection:
            connection.execute(sa.delete(REFUSALS).where(_refusals.owner == owner))

    def current(self) -> Sequence[StoreHealth]:
        """Delete the expired records. Return the health in each remaining record, by expiry time, latest first.

        The method also tests the database. It raises StorageError if the table of jobs cannot be read, or if the
        database cannot be written.
        """
        query = sa.select(_refusals.state, _refusals.reason).order_by(_refusals.until.desc())
        with self._database.writing() as connection:
            connection.execute(sa.select(JOBS.c.seq).where(JOBS.c.seq == 0))
            connection.execute(sa.update(IDENTITY).values(id=IDENTITY.c.id))
            connection.execute(sa.delete(REFUSALS).where(_refusals.until <= self._database.now))
            return [StoreHealth(cast(StoreState, row.state), row.reason) for row in connection.execute(query)]
