"""One attempt at one job under one lease: run the job, store its outcome, or requeue the job if a retry may help.

When the lease is lost, nothing is stored any more, because the job may belong to another runner. This module uses no
SQL and no models.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

import structlog

from stable_audio_serve.artifacts.store import ArtifactStore
from stable_audio_serve.core.errors import (
    ModelRestartingError,
    ModelUnavailableError,
    OverloadedError,
    QuotaError,
    StableAudioError,
    StorageError,
    UnknownModelError,
)
from stable_audio_serve.core.failpoints import failpoint
from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs.job import Job, JobError, JobResult
from stable_audio_serve.jobs.runner.capacity import Capacity, StorageGate
from stable_audio_serve.jobs.runner.execution import JobExecutor
from stable_audio_serve.jobs.runner.heartbeat import LeaseId, lease_id
from stable_audio_serve.jobs.runner.long_pieces import LeaseLostError
from stable_audio_serve.jobs.runner.patient_calls import PatientCalls
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.runner_jobs import Report
from stable_audio_serve.jobs.store.turns import LEFT_TO_OTHERS_S

log = structlog.get_logger("stable_audio_serve.jobs")

StopReason = Literal["cancelled", "lost", "closing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerPauses:
    """How long a runner pauses between polls and retries, in seconds. Tests use shorter times."""

    first_poll_s: float = 0.25  # pause before the next poll of the queue; doubles while there is nothing to do
    last_poll_s: float = 3.0  # the longest pause between polls: how late a job may start if the wake-up call is lost
    report_s: float = 0.5  # between two transactions that store the progress of all jobs
    store_retry_s: float = 1.0  # before a job's outcome is stored again after an error of the database
    retry_s: float = 2.0  # longest delay before the first retry of a job; doubles with each attempt
    last_retry_s: float = 60.0
    probe_s: float = 1.0  # longest pause before the first probe of the artifact store; doubles with each refusal
    last_probe_s: float = 60.0


@dataclass(frozen=True, slots=True)
class AttemptContext:
    """Objects that the attempts of one runner share.

    `reports` has, for each job, the latest progress that was not sent to the database yet.
    """

    store: JobStore
    artifacts: ArtifactStore
    executor: JobExecutor
    capacity: Capacity
    gate: StorageGate
    settings: JobSettings
    pauses: RunnerPauses
    metrics: Metrics
    reports: dict[LeaseId, Report]


class Attempt:
    """One attempt at a job, which starts when the object is constructed.

    `task` ends when the job's outcome is stored, or the job is requeued, or its lease is lost.
    """

    def __init__(self, job: Job, context: AttemptContext) -> None:
        """`job` must be leased, and `context.capacity` must already count the job under the id of its lease."""
        self.job = job
        self.lease = lease_id(job)
        self._context = context
        self._calls = PatientCalls(retry_s=context.pauses.store_retry_s)
        self._stop_reason: StopReason | None = None
        self._has_started = False  # whether a model has worked on the job
        self._work = asyncio.create_task(context.executor.execute(job, self._report))
        self.task = asyncio.create_task(self._run())

    def stop(self, reason: StopReason) -> None:
        """Cancel the generation, which stops within one denoising step. Has no effect if the generation has ended."""
        if self._stop_reason is None and not self._work.done():
            self._stop_reason = reason
            self._work.cancel()

    async def _run(self) -> None:
        spec = self.job.spec
        with structlog.contextvars.bound_contextvars(job_id=spec.id, contract=spec.contract):
            log.info("job started", model=spec.model, attempt=self.job.attempts, fence=self.lease.fence)
            try:
                await asyncio.wait({self._work})
                self._context.reports.pop(self.lease, None)  # the progress is obsolete, because the work has ended
                now = await self._end()
            finally:
                self._work.cancel()
            if now is None:
                log.warning("lease lost", fence=self.lease.fence)
                self._context.metrics.increment("job_leases_lost")
            elif now.is_over:  # also true if the client cancelled the job before it was requeued
                await record_end(now, self._context)

    async def _end(self) -> Job | None:
        """Store the outcome of the work, or requeue the job. Returns the changed job, or None if its lease is lost."""
        if self.job.spec.sections:  # a finished section has changed the number of attempts that count
            now = await self._calls.call(self._context.store.clients.get, self.job.spec.ref)
            self.job = self.job if now is None else replace(self.job, attempts=now.attempts)
        if self._work.cancelled():
            return await self._end_stopped()
        error = self._work.exception()
        if error is None:
            return await self._succeed(self._work.result())
        if isinstance(error, LeaseLostError):
            return None
        if isinstance(error, QuotaError):  # a section of a long piece waits for the next minute of the client's key
            delay_s = error.retry_after_s or self._context.pauses.last_retry_s
            return await self._requeue(error.message, delay_s=delay_s, attempts=self.job.attempts - 1)
        if isinstance(error, OverloadedError | ModelRestartingError):
            return await self._requeue_refused(error)
        if isinstance(error, ModelUnavailableError | StorageError | UnknownModelError):
            # UnknownModelError too: another server that shares the job database may know the model.
            return await self._retry_or_give_up(error)
        if isinstance(error, StableAudioError):
            return await self._fail(JobError(error.kind, error.message, error.field))
        if isinstance(error, FileNotFoundError):
            return await self._fail(JobError("storage", "the job's upload is gone", "audio"))
        # An unexpected error. Its text is only in the log, because clients must not see it.
        log.error("job failed", exc_info=error)
        return await self._fail(JobError("generation_failed", f"generation failed; job id {self.job.spec.id}"))

    async def _end_stopped(self) -> Job | None:
        if self._stop_reason == "lost":
            return None
        if self._stop_reason == "cancelled":
            self._context.capacity.note_room(self.job.spec.model)
            return await self._calls.call(self._context.store.runners.stop, self.job)
        if self._stop_reason == "closing":
            return await self._requeue("the runner stops", delay_s=0.0, attempts=self.job.attempts - 1)
        return await self._retry_or_give_up(ModelUnavailableError("the generation was interrupted"))

    async def _succeed(self, result: JobResult) -> Job | None:
        ended = await self._calls.call(self._context.store.runners.succeed, self.job, result)
        if ended is None:
            ended = await self._find_own_success(result)
        if ended is not None:
            failpoint("after_commit")
        return ended

    async def _find_own_success(self, result: JobResult) -> Job | None:
        """Find out why the store refused `result`.

        An earlier write of `result` may have succeeded although the database's answer was lost. Then the method returns
        the ended job. Otherwise the lease is lost: the method deletes the result's file and returns None.
        """
        now = await self._calls.call(self._context.store.clients.get, self.job.spec.ref)
        if now is not None and now.result is not None and now.result.file.key == result.file.key:
            return now
        await self._context.artifacts.discard(result.file.key)
        return None

    async def _fail(self, error: JobError, *, is_dead_letter: bool = False) -> Job | None:
        return await self._calls.call(self._context.store.runners.fail, self.job, error, is_dead_letter=is_dead_letter)

    async def _retry_or_give_up(self, error: StableAudioError) -> Job | None:
        """Requeue the job with a random delay. If this was its last attempt, let it fail with `error` instead.

        If the model is unavailable, this runner leases no job of the model during the delay.
        """
        pauses = self._context.pauses
        delay_s = random.uniform(0.0, min(pauses.retry_s * 2**self.job.attempts, pauses.last_retry_s))
        if isinstance(error, ModelUnavailableError):
            self._context.capacity.close(self.job.spec.model, for_s=max(delay_s, error.retry_after_s or 0.0))
        if isinstance(error, StorageError):
            delay_s = max(delay_s, self._context.gate.others_first_s)
        age_s = (datetime.now(UTC) - self.job.created_at).total_seconds()
        if not self.job.is_readable and age_s < LEFT_TO_OTHERS_S:
            # A server of a newer version, which shares the database, can run the job.
            return await self._requeue(error.message, delay_s=pauses.last_retry_s, attempts=self.job.attempts - 1)
        if self.job.attempts >= self._context.settings.max_attempts:
            return await self._fail(JobError(error.kind, error.message, error.field), is_dead_letter=True)
        self._context.metrics.increment("job_retries", reason=error.kind)
        return await self._requeue(error.message, delay_s=delay_s, attempts=self.job.attempts)

    async def _requeue_refused(self, error: OverloadedError | ModelRestartingError) -> Job | None:
        """Requeue the job because a full engine refused it, or no replica runs. The attempt does not count."""
        pauses = self._context.pauses
        delay_s = min(error.retry_after_s or pauses.retry_s, pauses.last_retry_s)
        self._context.capacity.refuse(self.job.spec.model, self.job.spec.client, for_s=delay_s)
        return await self._requeue(error.message, delay_s=delay_s, attempts=self.job.attempts - 1)

    async def _requeue(self, reason: str, *, delay_s: float, attempts: int) -> Job | None:
        message = f"put back: {reason}"
        log.info("job put back", reason=message, delay_s=round(delay_s, 1))
        requeue = self._context.store.runners.requeue
        return await self._calls.call(
            requeue,
            self.job,
            delay_s=delay_s,
            attempts=attempts,
            message=message,
            has_started=self._has_started,
        )

    def _report(self, report: Report) -> None:
        capacity = self._context.capacity
        if report.stage != "queued":
            self._has_started = True
            capacity.advance(self.lease, done=report.fraction)
        self._context.reports[self.lease] = replace(report, eta_s=capacity.predict_end_s(self.lease))


async def record_end(ended: Job, context: AttemptContext) -> None:
    """Log a job that has ended, update the metrics, and delete the job's upload unless it is a dead letter."""
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
    elif spec.upload is not None:  # the upload of a dead letter is kept, because an operator may retry the job
        await context.artifacts.discard(spec.upload.file.key)
