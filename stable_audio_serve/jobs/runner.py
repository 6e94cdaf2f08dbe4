"""Runs waiting jobs, several at a time: claims, retries, cancels, recovers. What a job does is `jobs.execution`."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import structlog

from stable_audio_serve.artifacts.store import ArtifactStore
from stable_audio_serve.core.backend import Backend
from stable_audio_serve.core.errors import (
    GenerationError,
    ModelUnavailableError,
    OverloadedError,
    StableAudioError,
    StorageError,
)
from stable_audio_serve.core.metrics import Metrics, NullMetrics
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.jobs.execution import JobExecutor
from stable_audio_serve.jobs.job import Job, JobError, JobResult
from stable_audio_serve.jobs.notifier import Notifier
from stable_audio_serve.jobs.store import JobStore, Outlook

log = structlog.get_logger("stable_audio_serve.jobs")

_FIRST_POLL_S = 0.25  # doubles while there is nothing to do
_LAST_POLL_S = 2.0  # what a lost wake-up costs at most
_RETRY_S = 1.0
_MAX_RETRY_S = 60.0

_Key = tuple[str, str]


class JobRunner:
    """One life of the one runner of a job store: it takes over what was left running when it starts."""

    def __init__(
        self,
        store: JobStore,
        artifacts: ArtifactStore,
        backend: Backend,
        settings: Settings,
        *,
        notifier: Notifier | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """Without a notifier nobody is told of ended jobs."""
        self._store = store
        self._artifacts = artifacts
        self._settings = settings.jobs
        self._metrics = metrics or NullMetrics()
        self._notifier = notifier
        self._executor = JobExecutor(backend, artifacts, settings.api)
        self._owner = secrets.token_hex(8)
        self._tasks: dict[_Key, asyncio.Task[None]] = {}
        self._woken = asyncio.Event()
        self._is_closing = False
        self._loop_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Recover, then run jobs until `close`. Raises StorageError."""
        await self._reclaim()
        self._loop_task = asyncio.create_task(self._run_loop())

    def wake(self) -> None:
        """There may be something to do; call it on the runner's event loop."""
        self._woken.set()

    def check_health(self) -> None:
        """Raises GenerationError when the loop has ended, which it never should."""
        if self._loop_task is not None and self._loop_task.done():
            raise GenerationError("the job runner's loop has ended")

    async def close(self) -> None:
        """Stop; jobs in progress go back to waiting and lose no attempt."""
        self._is_closing = True
        tasks = [*self._tasks.values(), *([self._loop_task] if self._loop_task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._notifier is not None:
            await self._notifier.close()
        await self._executor.close()

    async def _run_loop(self) -> None:
        poll_s = _FIRST_POLL_S
        while True:
            self._woken.clear()
            try:
                outlook = await asyncio.to_thread(self._store.look, self._owner)
                num_done = await self._turn(outlook)
            except Exception:  # the runner outlives whatever its store does
                log.exception("the job runner cannot use its store")
                wait_s = _LAST_POLL_S
            else:
                poll_s = _FIRST_POLL_S if num_done else min(poll_s * 2, _LAST_POLL_S)
                wait_s = self._wait_s(outlook, poll_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._woken.wait()

    async def _turn(self, outlook: Outlook) -> int:
        """Act on cancellations and late jobs, then fill the free places; how many things there were to do."""
        self._metrics.gauge("jobs_running", len(self._tasks))
        self._metrics.gauge("jobs_queued", outlook.num_queued)
        num_done = 0
        if self._tasks or outlook.num_stops:
            await self._renew()
        if _is_due(outlook.reclaim_in_s):
            num_done += await self._reclaim()
        if _is_due(outlook.late_in_s):
            for job in await asyncio.to_thread(self._store.expire):
                await self._ended(job)
                num_done += 1
        if _is_due(outlook.webhook_in_s) and self._notifier is not None:
            self._notifier.deliver_due(then=self.wake)
        while _is_due(outlook.lease_in_s) and len(self._tasks) < self._settings.max_running:
            lease = partial(self._store.lease, self._owner, lease_s=self._settings.lease_s)
            leased = await asyncio.to_thread(lease)
            if leased is None:
                break
            self._begin(leased)
            num_done += 1
        return num_done

    @staticmethod
    def _wait_s(outlook: Outlook, poll_s: float) -> float:
        """Until the next poll, or until something comes due that is not due already."""
        times = (outlook.lease_in_s, outlook.reclaim_in_s, outlook.late_in_s, outlook.webhook_in_s)
        return min([poll_s, *(seconds for seconds in times if seconds is not None and seconds > 0)])

    def _begin(self, job: Job) -> None:
        key = (job.spec.contract, job.spec.id)
        self._tasks[key] = task = asyncio.create_task(self._run(job))
        task.add_done_callback(partial(self._finished, key))

    def _finished(self, key: _Key, task: asyncio.Task[None]) -> None:
        del self._tasks[key]
        if not task.cancelled() and task.exception() is not None:
            log.error("a job could not be ended", job_id=key[1], exc_info=task.exception())
        self.wake()

    async def _run(self, job: Job) -> None:
        spec = job.spec
        with structlog.contextvars.bound_contextvars(job_id=spec.id, contract=spec.contract):
            log.info("job started", model=spec.model, attempt=job.attempts)
            try:
                result = await self._executor.execute(job, partial(self._report, job))
            except asyncio.CancelledError:
                await self._stopped(job)
                raise
            except (ModelUnavailableError, OverloadedError) as error:
                await self._retry_or_fail(job, error)
            except StableAudioError as error:
                await self._fail(job, JobError(error.kind, error.message, error.field))
            except FileNotFoundError:
                await self._fail(job, JobError("storage", "the job's upload is gone", "audio"))
            except Exception:  # whatever it was, its text is for the log
                log.exception("job failed")
                await self._fail(job, JobError("generation_failed", f"generation failed; job id {spec.id}"))
            else:
                await self._succeed(job, result)

    async def _report(self, job: Job, stage: str, fraction: float, message: str) -> None:
        with suppress(StorageError):  # the next one may be written again
            await asyncio.to_thread(self._store.report, job, stage=stage, fraction=fraction, message=message)

    async def _succeed(self, job: Job, result: JobResult) -> None:
        ended = await self._settle(partial(self._store.succeed, job, result))
        if ended is None:
            await self._discard(job, result)
        await self._ended(ended)

    async def _discard(self, job: Job, result: JobResult) -> None:
        """The job is no longer ours: its file is of no use, unless whoever has the job makes the same one."""
        now = await asyncio.to_thread(self._store.get, job.spec.contract, job.spec.id)
        log.warning("job was taken away", job_id=job.spec.id, state=now.state if now else "unknown")
        if now is None or (now.is_over and now.result is None):
            await self._artifacts.delete(result.file.key)

    async def _fail(self, job: Job, error: JobError) -> None:
        await self._ended(await self._settle(partial(self._store.fail, job, error)))

    async def _retry_or_fail(self, job: Job, error: StableAudioError) -> None:
        """A full engine costs no attempt: the job only waits longer."""
        attempts = job.attempts - isinstance(error, OverloadedError)
        if attempts >= self._settings.max_attempts:
            await self._fail(job, JobError(error.kind, error.message, error.field))
            return
        backoff_s = min(_RETRY_S * 2**job.attempts, _MAX_RETRY_S) * random.uniform(0.5, 1.0)
        delay_s = max(backoff_s, min(error.retry_after_s or 0.0, _MAX_RETRY_S))
        log.info("job put back", reason=error.kind, delay_s=round(delay_s, 1))
        await self._requeue(job, delay_s=delay_s, attempts=attempts, message=f"put back: {error.message}")

    async def _stopped(self, job: Job) -> None:
        """Its task was cancelled: by its client, or because this runner closes."""
        if self._is_closing:
            await self._requeue(job, delay_s=0.0, attempts=job.attempts - 1, message="put back: the runner stops")
        else:
            await self._ended(await self._settle(partial(self._store.stop, job)))

    async def _renew(self) -> None:
        """Hold on to what this runner does, and stop what was cancelled or lost."""
        held = await asyncio.to_thread(partial(self._store.renew, self._owner, lease_s=self._settings.lease_s))
        wanted = {(job.contract, job.id) for job in held if not job.cancel_requested}
        for key, task in self._tasks.items():
            if key not in wanted and not task.cancelling():  # once: it is writing down its end by now
                task.cancel()

    async def _reclaim(self) -> int:
        """Take over from dead runners; how many jobs."""
        reclaimed = await asyncio.to_thread(partial(self._store.reclaim, max_attempts=self._settings.max_attempts))
        for job in reclaimed:
            log.warning("job was left running", job_id=job.spec.id, attempts=job.attempts, state=job.state)
            if job.is_over:
                await self._ended(job)
        return len(reclaimed)

    async def _requeue(self, job: Job, *, delay_s: float, attempts: int, message: str) -> None:
        change = partial(self._store.requeue, job, delay_s=delay_s, attempts=attempts, message=message)
        await self._settle(change)

    async def _settle(self, change: Callable[[], Job | None]) -> Job | None:
        """Write down what became of a job, as soon as the store can: a disk that is full now may not be later."""
        while True:
            try:
                return await asyncio.to_thread(change)
            except StorageError:
                await asyncio.sleep(_LAST_POLL_S)

    async def _ended(self, job: Job | None) -> None:
        """Account for a job that reached its end here; None when it was another's to end."""
        if job is None:
            return
        spec = job.spec
        run_s = (job.completed_at - job.started_at).total_seconds() if job.completed_at and job.started_at else 0.0
        error = job.error.code if job.error else None
        log.info("job ended", job_id=spec.id, contract=spec.contract, state=job.state, error=error, run_s=run_s)
        self._metrics.increment("jobs", state=job.state, contract=spec.contract)
        self._metrics.observe("job_run_ms", run_s * 1000, model=spec.model)
        if spec.upload is not None:
            with suppress(StorageError):
                await self._artifacts.delete(spec.upload.file.key)


def _is_due(in_s: float | None) -> bool:
    return in_s is not None and in_s <= 0
