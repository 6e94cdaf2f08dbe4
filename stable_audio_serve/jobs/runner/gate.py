"""Decides whether jobs may be started: not while the place for their files is known to refuse them.

A job whose file was refused has been computed for nothing. So no other job is started until as much can be written as
was refused, however long that takes; then one job, and all others when its file was kept.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress

import structlog

from stable_audio_serve.artifacts.store import ArtifactStore
from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.jobs.runner.pauses import RunnerPauses
from stable_audio_serve.jobs.store.health import Refusals, StoreHealth, health_of

log = structlog.get_logger("stable_audio_serve.jobs")

_GRACE_S = 60.0  # how long a probe may take before other processes forget the refusal
_LARGE = 1 << 10  # more jobs than a runner has


class StorageGate:
    """One runner's; belongs to its event loop."""

    def __init__(
        self,
        artifacts: ArtifactStore,
        refusals: Refusals,
        *,
        owner: str,
        metrics: Metrics,
        on_open: Callable[[], None],
        pauses: RunnerPauses,
    ) -> None:
        """`on_open` is called when more jobs may be started than before."""
        self._artifacts = artifacts
        self._refusals = refusals
        self._owner = owner
        self._metrics = metrics
        self._on_open = on_open
        self._limit = _LARGE
        self._needed_bytes = 0
        self._pauses = pauses
        self._pause_s = pauses.probe_s
        self._trying: asyncio.Task[None] | None = None

    def admits(self, num_running: int) -> bool:
        """Whether another job may be started while `num_running` jobs run."""
        return num_running < self._limit

    def refused(self, error: StorageError, *, num_bytes: int) -> None:
        """Note that a file of `num_bytes` could not be kept or, with 0, that a kept one could not be read."""
        self._limit = 0
        self._needed_bytes = max(self._needed_bytes, num_bytes)
        if self._trying is None:
            self._trying = asyncio.create_task(self._try(error))

    def kept(self) -> None:
        """Note that a file was kept."""
        if self._limit == 1:
            self._limit = _LARGE
            self._pause_s = self._pauses.probe_s
            self._on_open()

    async def close(self) -> None:
        """Stop trying, and withdraw the refusal that other processes see."""
        if self._trying is not None:
            self._trying.cancel()
            await asyncio.gather(self._trying, return_exceptions=True)
            with suppress(StorageError):  # it expires by itself
                await asyncio.to_thread(self._refusals.withdraw, self._owner)

    async def _try(self, error: StorageError) -> None:
        """Probe until a file as large as those that were refused can be written."""
        log.error("no jobs are started: files cannot be kept", reason=error.message, num_bytes=self._needed_bytes)
        self._metrics.gauge("job_files_refused", 1.0)
        refused: StorageError | None = error
        while refused is not None:
            pause_s = self._pause_s * random.uniform(0.5, 1.0)
            self._pause_s = min(2 * self._pause_s, self._pauses.last_probe_s)
            with suppress(StorageError):  # the database may be full too, which health checks notice by themselves
                await self._note(health_of(refused), for_s=pause_s + _GRACE_S)
            await asyncio.sleep(pause_s)
            refused = await self._probe()
        log.warning("jobs are started again: files can be kept")
        self._metrics.gauge("job_files_refused", 0.0)
        with suppress(StorageError):
            await asyncio.to_thread(self._refusals.withdraw, self._owner)
        self._limit, self._needed_bytes, self._trying = 1, 0, None
        self._on_open()

    async def _note(self, health: StoreHealth, *, for_s: float) -> None:
        """Cancelling it waits for its thread: what that writes must not come after the withdrawal in `close`."""
        noting = asyncio.ensure_future(asyncio.to_thread(self._refusals.note, self._owner, health, for_s=for_s))
        try:
            await asyncio.shield(noting)
        except asyncio.CancelledError:
            await asyncio.gather(noting, return_exceptions=True)
            raise

    async def _probe(self) -> StorageError | None:
        try:
            await self._artifacts.probe(self._needed_bytes)
        except StorageError as error:
            return error
        return None
