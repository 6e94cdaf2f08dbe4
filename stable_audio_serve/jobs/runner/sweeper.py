"""Delete old jobs and their files, files that no job refers to (orphans), and unfinished files.

Several sweepers may work on the same database and artifact store. They delete only files that certainly belong to this
database.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from stable_audio_serve.artifacts.keys import FOLDERS
from stable_audio_serve.artifacts.store import ArtifactStore
from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs.store.job_store import JobStore

log = structlog.get_logger("stable_audio_serve.jobs")

_BATCH = 100  # how many jobs are deleted in one transaction
_PAUSE_S = 0.1  # pause after each transaction, so that clients' requests are not delayed


class Sweeper:
    """Deletes old jobs and files. Each call of `sweep` makes one pass over the database and the artifact store."""

    def __init__(
        self,
        store: JobStore,
        artifacts: ArtifactStore,
        *,
        settings: JobSettings,
        clock: Clock | None = None,
    ) -> None:
        """`clock` returns the current time, to compute the age of files."""
        self._store = store
        self._artifacts = artifacts
        self._settings = settings
        self._clock = clock or SystemClock()

    async def sweep(self) -> dict[str, int]:
        """Delete files of three kinds, and return the number of deleted files of each kind.

        - `old`: files of ended jobs and published files that are older than `retention_s`
        - `orphans`: files to which no row in the database refers
        - `unfinished`: incomplete files whose writer was interrupted

        Errors are logged, and a later sweep tries again.
        """
        started_at = self._clock.monotonic()
        swept = {
            "old": await self._count_removed("old", self._remove_old),
            "orphans": await self._count_removed("orphans", self._remove_orphans),
            "unfinished": await self._count_removed("unfinished", self._remove_unfinished),
        }
        took_s = self._clock.monotonic() - started_at
        log.info("swept", **swept, took_s=round(took_s, 3))
        return swept

    async def _count_removed(self, kind: str, remove: Callable[[], Awaitable[int]]) -> int:
        try:
            num_removed = await remove()
        except Exception as error:  # the sweep continues with the next kind
            log.warning("a sweep failed", kind=kind, error=str(error), exc_info=not isinstance(error, StorageError))
            return 0
        return num_removed

    async def _remove_old(self) -> int:
        purge, age_s = self._store.retention.purge, self._settings.retention_s
        num_removed = 0
        while keys := await asyncio.to_thread(purge, age_s=age_s, limit=_BATCH):
            num_removed += await self._artifacts.discard(*keys)
            await asyncio.sleep(_PAUSE_S)
        return num_removed

    async def _remove_orphans(self) -> int:
        owner = await asyncio.to_thread(self._store.identity)
        since = await asyncio.to_thread(self._artifacts.claim, owner)
        if since is None:
            log.warning("orphans are not deleted: the artifact store belongs to another job database")
            return 0
        before = self._clock.time() - self._settings.orphan_after_s
        num_removed = 0
        for folder in FOLDERS:
            cursor = None
            while True:
                page = await asyncio.to_thread(self._artifacts.list_folder, folder, cursor=cursor)
                aged = [item.key for item in page.objects if since <= item.modified_at <= before]
                orphans = await asyncio.to_thread(self._store.retention.unreferenced, aged)
                num_removed += await self._artifacts.discard(*orphans)
                if (cursor := page.next_cursor) is None:
                    break
                await asyncio.sleep(_PAUSE_S)
        return num_removed

    async def _remove_unfinished(self) -> int:
        before = self._clock.time() - self._settings.orphan_after_s
        return await asyncio.to_thread(self._artifacts.sweep_unfinished, before=before)
