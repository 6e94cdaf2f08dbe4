"""Health of the job database and the artifact store.

A runner that cannot store files records this in the job database, so that all processes know it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import sqlalchemy as sa

from stable_audio_serve.artifacts.store import ArtifactStore
from stable_audio_serve.core.cached_query import CachedQuery
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


_SILENT_AFTER_S = 10.0
_SILENCE = StoreHealth("unavailable", "the job database does not answer")


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


class StoreWatch:
    """Caches the health of the stores, so that frequent health checks put no load on them. Checks the stores again when
    the cached health is old.

    Use it on one event loop only.
    """

    def __init__(
        self, database: Database, artifacts: ArtifactStore, *, fresh_s: float = 5.0, fresh_if_bad_s: float = 1.0
    ) -> None:
        """A result is cached for `fresh_s` seconds, or for `fresh_if_bad_s` seconds if a store is down.

        The constructor makes no check.
        """
        self._database = database
        self._refusals = Refusals(database)
        self._artifacts = artifacts
        self._check = CachedQuery(
            lambda: asyncio.to_thread(self._find),
            first=StoreHealth(),
            fresh_s=lambda health: fresh_s if health.state == "ok" else fresh_if_bad_s,
        )

    async def health(self) -> StoreHealth:
        """Return the health of the stores within a second.

        If a check takes longer, returns the cached health. After `_SILENT_AFTER_S` seconds without a result, the state
        is "unavailable".
        """
        health = await self._check.answer()
        return _SILENCE if self._check.running_s > _SILENT_AFTER_S else health

    def _find(self) -> StoreHealth:
        try:
            self._database.require_same()
            refusals = self._refusals.current()
            self._database.require_room()
            self._artifacts.require_place()
        except StorageError as error:
            return health_of(error)
        return refusals[0] if refusals else StoreHealth()

    async def close(self) -> None:
        """Wait less than a second for a check in progress."""
        await self._check.wait()
