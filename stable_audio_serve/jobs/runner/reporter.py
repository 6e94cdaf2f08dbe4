"""Writes down how far a runner's jobs are: all of them in one transaction, however often each says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from contextlib import suppress

from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.jobs.runner.heartbeat import LeaseId, lease_id
from stable_audio_serve.jobs.store.store import JobStore, Report

_INTERVAL_S = 0.5  # jobs and stages that take no longer are not worth a transaction


class Reporter:
    """Keeps the latest report of each job until it is written. Belongs to one event loop."""

    def __init__(self, store: JobStore, *, tell_lost: Callable[[Collection[LeaseId]], None]) -> None:
        """`tell_lost` is called with the leases that turn out to be gone."""
        self._store = store
        self._tell_lost = tell_lost
        self._latest: dict[LeaseId, Report] = {}
        self._writing: asyncio.Task[None] | None = None

    def put(self, report: Report) -> None:
        """Take in what is true now; it is written within half a second and what the database takes."""
        self._latest[lease_id(report.job)] = report
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())

    def drop(self, lease: LeaseId) -> None:
        """Forget what is not written yet: the job's end is."""
        self._latest.pop(lease, None)

    async def close(self) -> None:
        """Write nothing more."""
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)

    async def _write(self) -> None:
        while self._latest:
            await asyncio.sleep(_INTERVAL_S)
            reports = list(self._latest.values())
            self._latest.clear()
            with suppress(StorageError):  # the next ones may be written again
                if lost := await asyncio.to_thread(self._store.report, reports):
                    self._tell_lost([lease_id(job) for job in lost])
