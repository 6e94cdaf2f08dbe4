"""The jobs that one runner has leased: it takes more while there is room for them, and makes an attempt at each.

When to look for jobs, and what else is due, is for `JobRunner` to say. Knows no SQL, no models and no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from functools import partial

import structlog

from stable_audio_serve.core.catalog import ModelCatalog
from stable_audio_serve.core.errors import UnknownModelError
from stable_audio_serve.core.failpoints import failpoint
from stable_audio_serve.core.generation import Priority
from stable_audio_serve.core.pricing import WorkSize
from stable_audio_serve.jobs.job import Job
from stable_audio_serve.jobs.runner.attempt import Attempt, AttemptContext, StopReason
from stable_audio_serve.jobs.runner.gate import StorageGate
from stable_audio_serve.jobs.runner.heartbeat import LeaseHeartbeat, LeaseId, lease_id

log = structlog.get_logger("stable_audio_serve.jobs")


class LeasedJobs:
    """Belongs to one event loop."""

    def __init__(
        self,
        context: AttemptContext,
        *,
        owner: str,
        catalog: ModelCatalog,
        gate: StorageGate,
        on_end: Callable[[], None],
    ) -> None:
        """`on_end` is called whenever a job is leased no longer."""
        self._context = context
        self._owner = owner
        self._catalog = catalog
        self._gate = gate
        self._on_end = on_end
        self.heartbeat = LeaseHeartbeat(
            context.store, owner, lease_s=context.settings.lease_s, on_change=self.stop_changed
        )
        self.is_paused = False  # True: no more are leased, those in progress go on
        self._attempts: dict[LeaseId, Attempt] = {}
        self._is_leasing = False
        self._is_closing = False

    def __len__(self) -> int:
        """The jobs that are leased, and one that may be about to be."""
        return len(self._attempts) + int(self._is_leasing)

    @property
    def tasks(self) -> Collection[asyncio.Task[None]]:
        """What ends when the jobs in progress do."""
        return {attempt.task for attempt in self._attempts.values()}

    async def lease(self, priority: Priority, num_queued: int) -> int:
        """Lease up to `num_queued` waiting jobs while there is room for them. Returns how many were leased."""
        num_leased = 0
        lease_s = self._context.settings.lease_s
        while num_leased < num_queued and self._may_lease():
            models = self._context.capacity.open_models(priority)
            if models is not None and not models:
                break
            lease = partial(
                self._context.store.runners.lease, self._owner, lease_s=lease_s, models=models, priority=priority
            )
            self._is_leasing = True
            try:
                job = await asyncio.to_thread(lease)
                if job is None:
                    break
                failpoint("after_lease")
                self._begin(job)
            finally:
                self._is_leasing = False
            num_leased += 1
        return num_leased

    def put_back(self) -> int:
        """Lease no more and stop those in progress, which costs them no attempt. Returns how many still run."""
        self._is_closing = True
        for attempt in self._attempts.values():
            attempt.stop("closing")
        return len(self._attempts)

    def stop_changed(self, lost: Collection[LeaseId], to_cancel: Collection[LeaseId]) -> None:
        """Stop those whose leases are lost and those that their clients cancelled."""
        reasons: dict[LeaseId, StopReason] = dict.fromkeys(to_cancel, "cancelled")
        reasons |= dict.fromkeys(lost, "lost")
        for lease, reason in reasons.items():
            if lease in self._attempts:
                self._attempts[lease].stop(reason)

    def _may_lease(self) -> bool:
        is_open = not self._is_closing and not self.is_paused
        return is_open and self._gate.admits(self._context.capacity.num_running)

    def _begin(self, job: Job) -> None:
        lease = lease_id(job)
        try:
            size = WorkSize.of(job.spec.request, model=self._catalog.resolve(job.spec.model))
        except UnknownModelError:  # the attempt will fail with it
            size = WorkSize()
        self.heartbeat.hold(lease)
        self._context.capacity.begin(lease, model=job.spec.model, priority=job.spec.request.priority, size=size)
        self._attempts[lease] = attempt = Attempt(job, self._context)
        attempt.task.add_done_callback(partial(self._end, lease))

    def _end(self, lease: LeaseId, task: asyncio.Task[None]) -> None:
        del self._attempts[lease]
        self._context.capacity.end(lease)
        self.heartbeat.release(lease)
        if not task.cancelled() and task.exception() is not None:
            log.error("a job could not be ended", job_id=lease.ref.id, exc_info=task.exception())
        self._on_end()
