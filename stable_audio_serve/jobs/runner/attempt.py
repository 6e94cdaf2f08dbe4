"""One attempt at one job, under one lease: runs it, writes its progress and its end, puts it back where that may help.

Once the lease is lost nothing is written any more: the job belongs to another runner. Uses no SQL and no models.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal, ParamSpec, TypeVar

import structlog

from stable_audio_serve.artifacts.store import ArtifactStore
from stable_audio_serve.core.errors import (
    ModelUnavailableError,
    OverloadedError,
    StableAudioError,
    StorageError,
    UnknownModelError,
)
from stable_audio_serve.core.failpoints import failpoint
from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs.job import Job, JobError, JobResult
from stable_audio_serve.jobs.runner.capacity import Capacity
from stable_audio_serve.jobs.runner.execution import JobExecutor
from stable_audio_serve.jobs.runner.heartbeat import LeaseId, lease_id
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.runner_jobs import Report

log = structlog.get_logger("stable_audio_serve.jobs")

P = ParamSpec("P")
T = TypeVar("T")
StopReason = Literal["cancelled", "lost", "closing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerPauses:
    """How long a runner waits where nothing calls it back, seconds; tests give shorter times than these."""

    first_poll_s: float = 0.25  # doubles while there is nothing to do
    last_poll_s: float = 3.0  # the most that a lost wake-up costs; with it idle runners ask less than once a second
    report_s: float = 0.5  # between two reports of progress, each a transaction for all jobs
    settle_s: float = 1.0  # until the end of a job is written again when the store has failed
    retry_s: float = 2.0  # at most, before another attempt at a job; doubles with each
    last_retry_s: float = 60.0
    probe_s: float = 1.0  # at most, before the place for files is tried again; doubles with each refusal
    last_probe_s: float = 60.0


@dataclass(frozen=True, slots=True)
class AttemptContext:
    """What the attempts of one runner share. `reports` has the latest progress of each job that is not written yet."""

    store: JobStore
    artifacts: ArtifactStore
    executor: JobExecutor
    capacity: Capacity
    settings: JobSettings
    pauses: RunnerPauses
    metrics: Metrics
    reports: dict[LeaseId, Report]


class Attempt:
    """Starts at construction; `task` ends once the store has the job's end or its return to the queue."""

    def __init__(self, job: Job, context: AttemptContext) -> None:
        """`job` must be leased, and counted in `context.capacity` under its lease id."""
        self.job = job
        self.lease = lease_id(job)
        self._context = context
        self._stop_reason: StopReason | None = None
        self._work = asyncio.create_task(context.executor.execute(job, self._report))
        self.task = asyncio.create_task(self._run())

    def stop(self, reason: StopReason) -> None:
        """End the work within a step of the model. Does nothing once the work is done and only its end is written."""
        if self._stop_reason is None and not self._work.done():
            self._stop_reason = reason
            self._work.cancel()

    async def _run(self) -> None:
        spec = self.job.spec
        with structlog.contextvars.bound_contextvars(job_id=spec.id, contract=spec.contract):
            log.info("job started", model=spec.model, attempt=self.job.attempts, fence=self.lease.fence)
            try:
                await asyncio.wait({self._work})
                self._context.reports.pop(self.lease, None)  # its end will be written
                now = await self._end()
            finally:
                self._work.cancel()
            if now is None:
                log.warning("lease lost", fence=self.lease.fence)
                self._context.metrics.increment("job_leases_lost")
            elif now.is_over:  # a job that is put back is over if it was cancelled in the meantime
                await record_end(now, self._context)

    async def _end(self) -> Job | None:
        """Write how the work ended. Returns the job as it is now, None when the lease is lost."""
        if self._work.cancelled():
            return await self._end_stopped()
        error = self._work.exception()
        if error is None:
            return await self._succeed(self._work.result())
        if isinstance(error, OverloadedError):
            return await self._put_back(error)
        if isinstance(error, ModelUnavailableError | StorageError | UnknownModelError):
            return await self._retry_or_give_up(error)  # a newer server, about to replace this one, may know the model
        if isinstance(error, StableAudioError):
            return await self._fail(JobError(error.kind, error.message, error.field))
        if isinstance(error, FileNotFoundError):
            return await self._fail(JobError("storage", "the job's upload is gone", "audio"))
        log.error("job failed", exc_info=error)  # its text may contain anything, so it goes to the log only
        return await self._fail(JobError("generation_failed", f"generation failed; job id {self.job.spec.id}"))

    async def _end_stopped(self) -> Job | None:
        if self._stop_reason == "lost":
            return None
        if self._stop_reason == "cancelled":
            return await self._settle(self._context.store.runners.stop, self.job)
        if self._stop_reason == "closing":
            return await self._requeue("the runner stops", delay_s=0.0, attempts=self.job.attempts - 1)
        return await self._retry_or_give_up(ModelUnavailableError("the generation was broken off"))

    async def _succeed(self, result: JobResult) -> Job | None:
        ended = await self._settle(self._context.store.runners.succeed, self.job, result)
        if ended is None:
            ended = await self._find_own_success(result)
        if ended is not None:
            failpoint("after_commit")
        return ended

    async def _find_own_success(self, result: JobResult) -> Job | None:
        """Returns the job if the store has this success and only its answer got lost; deletes the file if not."""
        now = await self._settle(self._context.store.clients.get, self.job.spec.ref)
        if now is not None and now.result is not None and now.result.file.key == result.file.key:
            return now
        with suppress(StorageError):  # the sweeper finds it
            await self._context.artifacts.delete(result.file.key)
        return None

    async def _fail(self, error: JobError, *, is_dead_letter: bool = False) -> Job | None:
        return await self._settle(self._context.store.runners.fail, self.job, error, is_dead_letter=is_dead_letter)

    async def _retry_or_give_up(self, error: StableAudioError) -> Job | None:
        """Put the job back for a while, in which no other job of an unavailable model is leased."""
        pauses = self._context.pauses
        delay_s = random.uniform(0.0, min(pauses.retry_s * 2**self.job.attempts, pauses.last_retry_s))
        if isinstance(error, ModelUnavailableError):
            self._context.capacity.close(self.job.spec.model, for_s=max(delay_s, error.retry_after_s or 0.0))
        if self.job.attempts >= self._context.settings.max_attempts:
            return await self._fail(JobError(error.kind, error.message, error.field), is_dead_letter=True)
        self._context.metrics.increment("job_retries", reason=error.kind)
        return await self._requeue(error.message, delay_s=delay_s, attempts=self.job.attempts)

    async def _put_back(self, error: OverloadedError) -> Job | None:
        """Put back a job that a full engine refused; this costs it no attempt."""
        pauses = self._context.pauses
        delay_s = min(error.retry_after_s or pauses.retry_s, pauses.last_retry_s)
        self._context.capacity.close(self.job.spec.model, for_s=delay_s)
        return await self._requeue(error.message, delay_s=delay_s, attempts=self.job.attempts - 1)

    async def _requeue(self, reason: str, *, delay_s: float, attempts: int) -> Job | None:
        message = f"put back: {reason}"
        log.info("job put back", reason=message, delay_s=round(delay_s, 1))
        requeue = self._context.store.runners.requeue
        return await self._settle(requeue, self.job, delay_s=delay_s, attempts=attempts, message=message)

    async def _settle(self, change: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Call `change` until the store can be used and return its answer. If that takes long, the lease is lost."""
        while True:
            try:
                return await asyncio.to_thread(change, *args, **options)
            except StorageError:
                await asyncio.sleep(self._context.pauses.settle_s)

    def _report(self, report: Report) -> None:
        capacity = self._context.capacity
        if report.stage != "queued":
            capacity.advance(self.lease, done=report.fraction)
        self._context.reports[self.lease] = replace(report, eta_s=capacity.predict_end_s(self.lease))


async def record_end(ended: Job, context: AttemptContext) -> None:
    """Count and log a job whose end is in the store, and delete its upload."""
    spec = ended.spec
    run_s = (ended.completed_at - ended.started_at).total_seconds() if ended.completed_at and ended.started_at else 0.0
    error = ended.error.code if ended.error else None
    log.info("job ended", job_id=spec.id, contract=spec.contract, state=ended.state, error=error, run_s=run_s)
    metrics = context.metrics
    metrics.increment("jobs", state=ended.state, contract=spec.contract)
    if ended.started_at is not None:
        metrics.observe("job_wait_ms", (ended.started_at - ended.created_at).total_seconds() * 1000, model=spec.model)
    if ended.is_dead_letter:
        metrics.increment("job_dead_letters", reason=error or "")
    elif spec.upload is not None:  # an operator may retry a dead letter, which needs it
        with suppress(StorageError):
            await context.artifacts.delete(spec.upload.file.key)
