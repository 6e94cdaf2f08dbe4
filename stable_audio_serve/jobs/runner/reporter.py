"""Writes the progress of a runner's jobs: all of them in one transaction, however often each reports."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from contextlib import suppress

from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.jobs.runner.heartbeat import LeaseId, lease_id
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.runner_jobs import Report


class Reporter:
    """Keeps the latest report of each job until it is written. Belongs to one event loop."""

    def __init__(self, store: JobStore, *, pause_s: float, on_lost: Callable[[Collection[LeaseId]], None]) -> None:
        """Reports wait for `pause_s` seconds to be written together. `on_lost` gets the leases that turn out lost."""
        self._store = store
        self._pause_s = pause_s
        self._on_lost = on_lost
        self._latest: dict[LeaseId, Report] = {}
        self._writing: asyncio.Task[None] | None = None

    def put(self, report: Report) -> None:
        """Replace the job's report; it is written after the pause."""
        self._latest[lease_id(report.job)] = report
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())

    def drop(self, lease: LeaseId) -> None:
        """Forget what is not written yet, because the job's end will be."""
        self._latest.pop(lease, None)

    async def close(self) -> None:
        """Stop writing; what is not written yet is lost."""
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)

    async def _write(self) -> None:
        while self._latest:
            await asyncio.sleep(self._pause_s)
            reports = list(self._latest.values())
            self._latest.clear()
            with suppress(StorageError):  # later reports may succeed
                if lost := await asyncio.to_thread(self._store.runners.report, reports):
                    self._on_lost([lease_id(job) for job in lost])
