"""How the stores are, for whoever asks the server: tried out now and then, told from memory in between."""

from __future__ import annotations

import asyncio

from stable_audio_serve.artifacts.store import ArtifactStore
from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.refusals import Refusals, StoreHealth, health_of

_FRESH_S = 5.0
_FRESH_IF_BAD_S = 1.0
_PATIENCE_S = 0.8  # of whoever asks; by then the last answer is better than a late one
_SILENT_AFTER_S = 10.0
_SILENCE = StoreHealth("unavailable", "the job database does not answer")


class StoreWatch:
    """Belongs to one event loop."""

    def __init__(self, database: Database, artifacts: ArtifactStore, *, clock: Clock | None = None) -> None:
        """Touches nothing yet."""
        self._database = database
        self._refusals = Refusals(database)
        self._artifacts = artifacts
        self._clock = clock or SystemClock()
        self._latest = StoreHealth()
        self._looked_at = float("-inf")
        self._began_at = float("-inf")
        self._looking: asyncio.Task[None] | None = None

    async def health(self) -> StoreHealth:
        """How the stores are, or what is known of them, within a second."""
        fresh_s = _FRESH_S if self._latest.state == "ok" else _FRESH_IF_BAD_S
        if self._looking is None and self._clock.monotonic() - self._looked_at < fresh_s:
            return self._latest
        if self._looking is None:
            self._began_at = self._clock.monotonic()
            self._looking = asyncio.create_task(self._look())
        done, _ = await asyncio.wait({self._looking}, timeout=_PATIENCE_S)
        is_silent = not done and self._clock.monotonic() - self._began_at > _SILENT_AFTER_S
        return _SILENCE if is_silent else self._latest

    async def _look(self) -> None:
        try:
            self._latest = await asyncio.to_thread(self._find)
        finally:
            self._looked_at = self._clock.monotonic()
            self._looking = None

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
        """Look no more."""
        if self._looking is not None:
            await asyncio.wait({self._looking}, timeout=_PATIENCE_S)
