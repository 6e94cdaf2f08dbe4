"""The health of the job database and the artifact store, for health checks.

It is cached, so that frequent health checks do not load the stores.
"""

from __future__ import annotations

import asyncio

from stable_audio_serve.artifacts.store import ArtifactStore
from stable_audio_serve.core.cached_query import CachedQuery
from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.health import Refusals, StoreHealth, health_of

_SILENT_AFTER_S = 10.0
_SILENCE = StoreHealth("unavailable", "the job database does not answer")


class StoreWatch:
    """Caches the health of the stores, and checks the stores again when the cached health is old.

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
