"""The health of the job database and the artifact store, for health checks.

It is cached, so that frequent health checks do not load the stores.
"""

from __future__ import annotations

import asyncio

from stable_audio_serve.artifacts.store import ArtifactStore
from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.health import Refusals, StoreHealth, health_of

_TIMEOUT_S = 0.8  # how long a caller waits for the stores before it gets the cached answer
_SILENT_AFTER_S = 10.0
_SILENCE = StoreHealth("unavailable", "the job database does not answer")


class StoreWatch:
    """Caches the health of the stores, and checks the stores again when the cached health is old.

    Use it on one event loop only.
    """

    def __init__(
        self,
        database: Database,
        artifacts: ArtifactStore,
        *,
        fresh_s: float = 5.0,
        fresh_if_bad_s: float = 1.0,
        clock: Clock | None = None,
    ) -> None:
        """A result is cached for `fresh_s` seconds, or for `fresh_if_bad_s` seconds if a store is down.

        The constructor makes no check.
        """
        self._database = database
        self._refusals = Refusals(database)
        self._artifacts = artifacts
        self._fresh_s = fresh_s
        self._fresh_if_bad_s = fresh_if_bad_s
        self._clock = clock or SystemClock()
        self._latest = StoreHealth()
        self._checked_at = float("-inf")
        self._began_at = float("-inf")
        self._checking: asyncio.Task[None] | None = None

    async def health(self) -> StoreHealth:
        """Return the health of the stores within a second.

        If a check takes longer, returns the cached health. After `_SILENT_AFTER_S` seconds without a result, the state
        is "unavailable".
        """
        fresh_s = self._fresh_s if self._latest.state == "ok" else self._fresh_if_bad_s
        if self._checking is None and self._clock.monotonic() - self._checked_at < fresh_s:
            return self._latest
        if self._checking is None:
            self._began_at = self._clock.monotonic()
            self._checking = asyncio.create_task(self._check())
        done, _ = await asyncio.wait({self._checking}, timeout=_TIMEOUT_S)
        is_silent = not done and self._clock.monotonic() - self._began_at > _SILENT_AFTER_S
        return _SILENCE if is_silent else self._latest

    async def _check(self) -> None:
        try:
            self._latest = await asyncio.to_thread(self._find)
        finally:
            self._checked_at = self._clock.monotonic()
            self._checking = None

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
        """Wait at most `_TIMEOUT_S` for a check in progress."""
        if self._checking is not None:
            await asyncio.wait({self._checking}, timeout=_TIMEOUT_S)
