"""One attempt at one job, under one lease: runs it, writes down its progress and how it ended, retries what may pass.

Once the lease is lost nothing is written any more: the job is another runner's.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import structlog

from stable_audio_serve.artifacts.store import ArtifactStore
from stable_audio_serve.core.clock import Clock
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
from stable_audio_serve.jobs.runner.execution import GENERATED, JobExecutor, JobProgress
from stable_audio_serve.jobs.runner.heartbeat import lease_id
from stable_audio_serve.jobs.runner.reporter import Reporter
from stable_audio_serve.jobs.store.store import JobStore, Report

log = structlog.get_logger("stable_audio_serve.jobs")

T = TypeVar("T")
StopReason = Literal["cancelled", "lost", "closing"]

_SETTLE_RETRY_S = 1.0
_RETRY_S = 2.0  # doubles with each attempt
_MAX_RETRY_S = 60.0
_LEAST_ELAPSED_S = 0.5  # before that, and before this share of the work, nothing can be told from a job's own pace
_LEAST_DONE = 0.05


@dataclass(frozen=True, slots=True)
class Workplace:
    """What every attempt of a runner uses."""

    store: JobStore
    artifacts: ArtifactStore
    executor: JobExecutor
    capacity: Capacity
    reporter: Reporter
    settings: JobSettings
    metrics: Metrics
    clock: Clock


class Attempt:
    """Runs from its making on; `task` ends when the job's end, or its return to the queue, is written down."""

    def __init__(self, job: Job, workplace: Workplace) -> None:
        """`job` is leased and counted in `workplace.capacity` under its lease id."""
        self.job = job
        self.lease = lease_id(job)
        self._at = workplace
        self._stop_reason: StopReason | None = None
        self._working_since: float | None = None
        self._work = asyncio.create_task(workplace.executor.execute(job, self._report))
        self.task = asyncio.create_task(self._run())

    def stop(self, reason: StopReason) -> None:
        """End the work, within a step of the model; nothing happens when it is done and only being written down."""
        if self._stop_reason is None and not self._work.done():
            self._stop_reason = reason
            self._work.cancel()

    async def _run(self) -> None:
        spec = self.job.spec
        with structlog.contextvars.bound_contextvars(job_id=spec.id, contract=spec.contract):
            log.info("job started", model=spec.model, attempt=self.job.attempts, fence=self.lease.fence)
            try:
                await asyncio.wait({self._work})
                self._at.reporter.drop(self.lease)
                await self._end()
            finally:
                self._work.cancel()

    async def _end(self) -> None:
        if self._work.cancelled():
            await self._stopped()
            return
        error = self._work.exception()
        if error is None:
            await self._succeed(self._work.result())
        elif isinstance(error, OverloadedError):
            await self._put_back(error)
        elif isinstance(error, ModelUnavailableError | StorageError | UnknownModelError):
            await self._retry_or_give_up(error)  # a model may be one that a newer server knows, about to replace us
        elif isinstance(error, StableAudioError):
            await self._fail(JobError(error.kind, error.message, error.field))
        elif isinstance(error, FileNotFoundError):
            await self._fail(JobError("storage", "the job's upload is gone", "audio"))
        else:  # whatever it was, its text is for the log
            log.error("job failed", exc_info=error)
            job_id = self.job.spec.id
            await self._fail(JobError("generation_failed", f"generation failed; job id {job_id}"))

    # Ends

    async def _succeed(self, result: JobResult) -> None:
        ended = await self._settle(partial(self._at.store.succeed, self.job, result))
        if ended is None:
            ended = await self._look_again(result)
        if ended is not None:
            failpoint("after_commit")
            await account_for(ended, self._at)

    async def _look_again(self, result: JobResult) -> Job | None:
        """The job, if its success is ours after all and only the store's answer got lost; else our file is waste."""
        now = await self._settle(partial(self._at.store.get, self.job.spec.ref))
        if now is not None and now.result is not None and now.result.file.key == result.file.key:
            return now
        self._count_lost(now)
        with suppress(StorageError):  # the sweeper finds it
            await self._at.artifacts.delete(result.file.key)
        return None

    async def _fail(self, error: JobError, *, is_dead_letter: bool = False) -> None:
        store = self._at.store
        ended = await self._settle(partial(store.fail, self.job, error, is_dead_letter=is_dead_letter))
        await self._account_for(ended)

    async def _retry_or_give_up(self, error: StableAudioError) -> None:
        """What was not the job's own fault may pass; the model is left alone for a while too."""
        delay_s = random.uniform(0.0, min(_RETRY_S * 2**self.job.attempts, _MAX_RETRY_S))
        if isinstance(error, ModelUnavailableError):
            self._at.capacity.close(self.job.spec.model, for_s=max(delay_s, error.retry_after_s or 0.0))
        if self.job.attempts >= self._at.settings.max_attempts:
            await self._fail(JobError(error.kind, error.message, error.field), is_dead_letter=True)
            return
        self._at.metrics.increment("job_retries", reason=error.kind)
        message = f"put back: {error.message}"
        await self._requeue(delay_s=delay_s, attempts=self.job.attempts, message=message)

    async def _put_back(self, error: OverloadedError) -> None:
        """A full engine costs no attempt, only patience."""
        delay_s = min(error.retry_after_s or _RETRY_S, _MAX_RETRY_S)
        self._at.capacity.close(self.job.spec.model, for_s=delay_s)
        message = f"put back: {error.message}"
        await self._requeue(delay_s=delay_s, attempts=self.job.attempts - 1, message=message)

    async def _stopped(self) -> None:
        if self._stop_reason == "lost":
            self._count_lost(None)
        elif self._stop_reason == "cancelled":
            await self._account_for(await self._settle(partial(self._at.store.stop, self.job)))
        elif self._stop_reason == "closing":
            message = "put back: the runner stops"
            await self._requeue(delay_s=0.0, attempts=self.job.attempts - 1, message=message)
        else:
            await self._retry_or_give_up(ModelUnavailableError("the generation was broken off"))

    async def _requeue(self, *, delay_s: float, attempts: int, message: str) -> None:
        log.info("job put back", reason=message, delay_s=round(delay_s, 1))
        requeue = partial(self._at.store.requeue, self.job, delay_s=delay_s, attempts=attempts, message=message)
        now = await self._settle(requeue)
        if now is None or now.is_over:  # it was cancelled in the meantime
            await self._account_for(now)

    async def _account_for(self, ended: Job | None) -> None:
        if ended is None:
            self._count_lost(None)
        else:
            await account_for(ended, self._at)

    def _count_lost(self, now: Job | None) -> None:
        log.warning("lease lost", fence=self.lease.fence, state=now.state if now else "unknown")
        self._at.metrics.increment("job_leases_lost")

    async def _settle(self, change: Callable[[], T]) -> T:
        """Write down what became of the job, as soon as the store can: if that takes too long, the lease is lost."""
        while True:
            try:
                return await asyncio.to_thread(change)
            except StorageError:
                await asyncio.sleep(_SETTLE_RETRY_S)

    # Progress

    def _report(self, progress: JobProgress) -> None:
        if progress.stage != "queued":
            if self._working_since is None:
                self._working_since = self._at.clock.monotonic()
            self._at.capacity.advance(self.lease, done=progress.fraction / GENERATED)
        eta_s = self._eta_s(progress)
        self._at.reporter.put(Report(self.job, progress.stage, progress.fraction, eta_s, progress.engine_position))

    def _eta_s(self, progress: JobProgress) -> float | None:
        """Predicted time to the end of the generation, seconds: from its own pace, else from earlier jobs."""
        done = progress.fraction / GENERATED
        if self._working_since is not None:
            elapsed_s = self._at.clock.monotonic() - self._working_since
            if done >= _LEAST_DONE and elapsed_s >= _LEAST_ELAPSED_S:
                return elapsed_s * (1.0 - done) / done
        return self._at.capacity.predict_end_s(self.lease)


async def account_for(ended: Job, workplace: Workplace) -> None:
    """What is left to do for a job that has reached its end in the store: figures, a log line, its upload."""
    spec = ended.spec
    run_s = (ended.completed_at - ended.started_at).total_seconds() if ended.completed_at and ended.started_at else 0.0
    error = ended.error.code if ended.error else None
    log.info("job ended", job_id=spec.id, contract=spec.contract, state=ended.state, error=error, run_s=run_s)
    metrics = workplace.metrics
    metrics.increment("jobs", state=ended.state, contract=spec.contract)
    if ended.started_at is not None:
        metrics.observe("job_wait_ms", (ended.started_at - ended.created_at).total_seconds() * 1000, model=spec.model)
    metrics.observe("job_run_ms", run_s * 1000, model=spec.model)
    if ended.is_dead_letter:
        metrics.increment("job_dead_letters", reason=error or "")
    elif spec.upload is not None:  # an operator may try a dead letter again
        with suppress(StorageError):
            await workplace.artifacts.delete(spec.upload.file.key)
