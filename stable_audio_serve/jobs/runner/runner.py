"""The job runner. Any number of runners can share a job database.

A runner leases jobs while there is capacity, renews the leases, makes an attempt at each job, and requeues the jobs of
dead runners. This module uses no SQL, no models and no HTTP.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import get_args

import structlog

from stable_audio_serve.artifacts.store import ArtifactStore
from stable_audio_serve.core.backend import Backend
from stable_audio_serve.core.errors import GenerationError, StorageError, UnknownModelError
from stable_audio_serve.core.failpoints import failpoint
from stable_audio_serve.core.generation import Priority
from stable_audio_serve.core.metrics import Metrics, NullMetrics
from stable_audio_serve.core.pricing import Prices, WorkSize
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.jobs.job import Job, State
from stable_audio_serve.jobs.pieces.sections import sizes_of
from stable_audio_serve.jobs.runner.attempt import Attempt, AttemptContext, RunnerPauses, record_end
from stable_audio_serve.jobs.runner.capacity import Capacity, StorageGate
from stable_audio_serve.jobs.runner.execution import JobExecutor
from stable_audio_serve.jobs.runner.files import JobFiles
from stable_audio_serve.jobs.runner.heartbeat import LeaseHeartbeat, LeaseId, lease_id
from stable_audio_serve.jobs.runner.patient_calls import PatientCalls
from stable_audio_serve.jobs.runner.sweeper import Sweeper
from stable_audio_serve.jobs.store.health import Refusals
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.operator_jobs import Waiting
from stable_audio_serve.jobs.store.runner_jobs import Outlook
from stable_audio_serve.jobs.webhooks.notifier import Notifier

log = structlog.get_logger("stable_audio_serve.jobs")

_SUM_EVERY_S = 1.0  # seconds between two queries for the sum of the waiting work
# After such a query, the runner also pauses for this multiple of the query's duration, which is 1.8 ms for 10,000 jobs
# and 0.3 s for a million.
_SUM_REST = 20.0
_REPLICAS_S = 2.0  # seconds between polls of the number of replicas
_COUNT_S = 15.0  # seconds between two queries for the number of jobs in each state
_SWEEP_S = 600.0  # seconds between sweeps, which delete old files; a sweep lists all files in the artifact store
_SWEEPS_PER_AGE = 6  # at least this many sweeps in `orphan_after_s` seconds, on average
_SWEEP_SPREAD = 0.5  # the time between sweeps varies by up to this share, so that runners sweep at different times
_CLOSE_TIMEOUT_S = 3.0  # how long a stopping runner waits for its jobs to be requeued


class JobRunner:
    """One job runner. `owner` is its random name in the leases. Use the object on one event loop only."""

    def __init__(
        self,
        store: JobStore,
        artifacts: ArtifactStore,
        *,
        backend: Backend,
        settings: Settings,
        notifier: Notifier | None = None,
        metrics: Metrics | None = None,
        pauses: RunnerPauses = RunnerPauses(),
        prices: Callable[[str], Prices | None] = lambda model: None,
    ) -> None:
        """If `notifier` is None, no webhooks are sent. `prices` returns the last prices of a model's engines."""
        self._store = store
        self._backend = backend
        self._settings = settings.jobs
        self._metrics = metrics or NullMetrics()
        self._notifier = notifier
        self.owner = secrets.token_hex(8)
        self._pauses = pauses
        self._gate = StorageGate(
            artifacts,
            Refusals(store.database),
            owner=self.owner,
            metrics=self._metrics,
            on_open=self.wake,
            first_probe_s=pauses.probe_s,
            last_probe_s=pauses.last_probe_s,
        )
        self._known = [card.name for card in backend.catalog]
        self._capacity = Capacity(
            self._known,
            prices=prices,
            target_wait_s={model.name: model.replicas.target_wait_s for model in settings.models},
            max_running=self._settings.max_running,
        )
        self._context = AttemptContext(
            store=store,
            artifacts=artifacts,
            executor=JobExecutor(
                backend,
                JobFiles(artifacts, self._gate),
                store=store,
                calls=PatientCalls(retry_s=pauses.store_retry_s),
                limits=settings.api,
            ),
            capacity=self._capacity,
            gate=self._gate,
            settings=self._settings,
            pauses=pauses,
            metrics=self._metrics,
            reports={},
        )
        self._heartbeat = LeaseHeartbeat(
            store,
            self.owner,
            lease_s=self._settings.lease_s,
            held=lambda: tuple(self._attempts),  # thread-safe, because Python copies the keys in one operation
            on_change=self._stop_changed,
        )
        self._sweeper = Sweeper(store, artifacts, settings=self._settings)
        self._attempts: dict[LeaseId, Attempt] = {}
        self._outlook: Outlook | None = None
        self._reclaims_at = float("-inf")  # from then on, this runner takes over jobs whose leases have expired
        self._waiting: Mapping[str, Waiting] | None = None
        self._woken = asyncio.Event()
        self.is_holding = False  # True while an operator drains the server: then no jobs are leased
        self._is_leasing = False
        self._is_closing = False
        self._loop_task: asyncio.Task[None] | None = None
        self._background: list[asyncio.Task[None]] = []
        self._recording: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Run jobs until `close` is called."""
        self._heartbeat.start()
        if self._notifier is not None:
            self._notifier.start()
        self._loop_task = asyncio.create_task(self._run_loop())
        sweep_s = min(_SWEEP_S, self._settings.orphan_after_s / _SWEEPS_PER_AGE)
        background = (
            _repeat(self._write_reports, pause_s=self._pauses.report_s),
            _repeat(self._count, pause_s=_COUNT_S),
            _repeat(self._poll_replicas, pause_s=_REPLICAS_S),
            _repeat(self._sum_waiting, pause_s=_SUM_EVERY_S),
            _repeat(self._sweeper.sweep, pause_s=sweep_s, first_in_s=sweep_s, spread=_SWEEP_SPREAD),
        )
        self._background = [asyncio.create_task(work) for work in background]

    def wake(self) -> None:
        """Let the runner look for work now. Must be called on the runner's event loop."""
        self._woken.set()

    def waiting_work(self) -> Mapping[str, Waiting] | None:
        """Return the number and the work of each model's queued jobs, or None while they are unknown.

        Models without queued jobs are missing. While the artifact store refuses files, the mapping is empty: no replica
        is needed, because no runner can start the jobs.
        """
        return self._waiting if self._gate.admits(0) else {}

    def check_health(self) -> None:
        """Raise GenerationError if the runner's loop or the thread that renews leases has ended unexpectedly."""
        if self._loop_task is None:
            return
        if not self._heartbeat.is_alive or (self._loop_task.done() and not self._is_closing):
            raise GenerationError("the job runner's loop has ended")

    @property
    def num_held(self) -> int:
        """The number of jobs that this runner has leased. A lease in progress counts too."""
        return len(self._attempts) + int(self._is_leasing)

    def hold(self) -> None:
        """Lease no more jobs until `resume` is called. Jobs in progress continue."""
        self.is_holding = True

    def resume(self) -> None:
        """Lease jobs again."""
        self.is_holding = False
        self.wake()

    def drain(self) -> int:
        """Lease no more jobs, and requeue the jobs in progress, except jobs that a request waits for.

        The attempts at requeued jobs do not count. Returns the number of jobs that are neither requeued nor ended yet.
        """
        self._is_closing = True
        self.wake()
        self._requeue([attempt for attempt in self._attempts.values() if not attempt.job.spec.is_awaited])
        return self.num_held

    async def close(self) -> None:
        """Stop the runner. Jobs in progress are requeued, and their attempts do not count."""
        self.drain()
        self._requeue(self._attempts.values())
        await _finish({self._loop_task} if self._loop_task else set())
        self._requeue(self._attempts.values())  # again, for attempts that the loop began in the meantime
        await _finish({attempt.task for attempt in self._attempts.values()})
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await _finish(self._recording)
        await self._gate.close()
        if self._notifier is not None:
            await self._notifier.close()
        await asyncio.to_thread(self._heartbeat.close)
        await self._context.executor.close()

    @staticmethod
    def _requeue(attempts: Iterable[Attempt]) -> None:
        for attempt in attempts:
            attempt.stop("closing")

    async def _run_loop(self) -> None:
        poll_s = self._pauses.first_poll_s
        while not self._is_closing:
            self._woken.clear()
            try:
                self._outlook = outlook = await asyncio.to_thread(self._store.runners.outlook, self.owner)
                num_done = await self._turn(outlook)
            except Exception as error:  # no error of the job database may end the runner
                is_expected = isinstance(error, StorageError)
                log.error("the job runner cannot use the job database", error=str(error), exc_info=not is_expected)
                if is_expected and self._outlook is not None:  # after an outage, other runners must renew their leases
                    self._reclaims_at = time.monotonic() + self._settings.lease_s
                wait_s = self._pauses.last_poll_s
            else:
                poll_s = self._pauses.first_poll_s if num_done else min(poll_s * 2, self._pauses.last_poll_s)
                wait_s = _wait_s(outlook, poll_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._woken.wait()

    async def _turn(self, outlook: Outlook) -> int:
        """Do all work that `outlook` shows as due now. Returns the number of jobs that were changed."""
        self._metrics.gauge("job_queue_age_s", max(0.0, -(outlook.lease_in_s or 0.0)))
        num_done = 0
        if outlook.is_set_back:
            num_done += await asyncio.to_thread(self._store.runners.set_back)
        if outlook.num_stops:
            await asyncio.to_thread(self._heartbeat.beat)
        if _is_due(outlook.reclaim_in_s) and time.monotonic() >= self._reclaims_at:
            num_done += await self._reclaim()
        if _is_due(outlook.late_in_s):
            for job in await asyncio.to_thread(self._store.runners.expire):
                self._record_end(job)
                num_done += 1
        if _is_due(outlook.webhook_in_s) and self._notifier is not None:
            self._notifier.deliver_due()
        if _is_due(outlook.lease_in_s):
            for priority, num_queued in outlook.queued.items():
                num_done += await self._lease(priority, num_queued)
        return num_done

    async def _reclaim(self) -> int:
        """Requeue or end the jobs whose lease has expired because their runner died. Returns the number of jobs."""
        # Renew this runner's leases first. They may have expired too if the database was down.
        await asyncio.to_thread(self._heartbeat.beat)
        max_attempts = self._settings.max_attempts
        reclaimed = await asyncio.to_thread(self._store.runners.reclaim, max_attempts=max_attempts)
        for job in reclaimed:
            log.warning("job reclaimed", job_id=job.spec.id, attempts=job.attempts, state=job.state)
            if job.is_over:
                self._record_end(job)
        return len(reclaimed)

    def _record_end(self, job: Job) -> None:
        """Record a job that has ended without an attempt. No turn waits for the deletion of its upload."""
        recording = asyncio.create_task(record_end(job, self._context))
        self._recording.add(recording)
        recording.add_done_callback(self._recording.discard)

    async def _lease(self, priority: Priority, num_queued: int) -> int:
        """Lease and start queued jobs while there is capacity, at most `num_queued`. Returns how many were started."""
        store, lease_s = self._store.runners, self._settings.lease_s
        num_leased = 0
        while num_leased < num_queued and not (self._is_closing or self.is_holding):
            models = self._capacity.open_models(priority)
            if (models is not None and not models) or not self._gate.admits(self._capacity.num_running):
                break
            self._is_leasing = True
            try:
                job = await asyncio.to_thread(
                    store.lease,
                    self.owner,
                    lease_s=lease_s,
                    models=models,
                    known=self._known,
                    without=self._capacity.left_out(priority),
                    priority=priority,
                )
                if job is None:
                    break
                failpoint("after_lease")
                self._begin(job)
            finally:
                self._is_leasing = False
            num_leased += 1
        return num_leased

    def _begin(self, job: Job) -> None:
        lease = lease_id(job)
        try:
            sizes = sizes_of(job.spec, model=self._backend.catalog.find(job.spec.model))
        except UnknownModelError:  # then the attempt fails with the same error
            sizes = [WorkSize()]
        self._capacity.begin(
            lease,
            model=job.spec.model,
            client=job.spec.client,
            priority=job.spec.request.priority,
            size=WorkSize.sum(sizes),
            at_once=max(sizes, key=lambda size: size.evaluated_s),
        )
        self._attempts[lease] = attempt = Attempt(job, self._context)
        attempt.task.add_done_callback(partial(self._end, lease))

    def _end(self, lease: LeaseId, task: asyncio.Task[None]) -> None:
        del self._attempts[lease]
        self._capacity.end(lease)
        if not task.cancelled() and task.exception() is not None:
            log.error("the outcome of a job could not be handled", job_id=lease.ref.id, exc_info=task.exception())
        self.wake()

    def _stop_changed(self, lost: Collection[LeaseId], to_cancel: Collection[LeaseId]) -> None:
        """Stop the attempts at jobs whose lease was lost or whose client cancelled them."""
        for lease in (*lost, *to_cancel):
            if lease in self._attempts:
                self._attempts[lease].stop("lost" if lease in lost else "cancelled")

    async def _write_reports(self) -> None:
        """Store the latest progress of all running jobs in one transaction."""
        if reports := list(self._context.reports.values()):
            self._context.reports.clear()
            lost = await asyncio.to_thread(self._store.runners.report, reports)
            self._stop_changed([lease_id(job) for job in lost], ())

    async def _count(self) -> None:
        """Update the metric of jobs by state. All runners export the same numbers."""
        counts = await asyncio.to_thread(self._store.operators.counts)
        for state in get_args(State):
            self._metrics.gauge("jobs_by_state", counts.get(state, 0), state=state)

    async def _poll_replicas(self) -> None:
        if self._outlook is None or _is_due(self._outlook.lease_in_s):
            status = await self._backend.status()
            self._capacity.set_replicas({name: model.num_replicas for name, model in status.items()})

    async def _sum_waiting(self) -> None:
        """Update `_waiting`, the number and the work of each model's queued jobs.

        If the queue is empty, no query is made. After a query, pauses for `_SUM_REST` times the query's duration.
        """
        if self._outlook is None or not self._outlook.num_queued:
            self._waiting = None if self._outlook is None else {}
            return
        started_at = time.monotonic()
        try:
            self._waiting = await asyncio.to_thread(self._store.operators.waiting_work)
        except StorageError:
            self._waiting = None
        await asyncio.sleep(_SUM_REST * (time.monotonic() - started_at))


async def _repeat(
    action: Callable[[], Awaitable[object]], *, pause_s: float, first_in_s: float = 0.0, spread: float = 0.0
) -> None:
    """Run `action` again and again, with pauses of about `pause_s` seconds.

    Each pause is multiplied by a random factor from `1 - spread` to `1 + spread`. Errors are logged, except
    StorageError, which the runner's loop logs.
    """
    await asyncio.sleep(first_in_s * random.uniform(1.0 - spread, 1.0 + spread))
    while True:
        try:
            with suppress(StorageError):
                await action()
        except Exception:
            log.exception("background work failed")
        await asyncio.sleep(pause_s * random.uniform(1.0 - spread, 1.0 + spread))


async def _finish(tasks: Collection[asyncio.Task[None]]) -> None:
    """Wait at most `_CLOSE_TIMEOUT_S` until the tasks end, then cancel the tasks that still run."""
    if tasks:
        await asyncio.wait(tasks, timeout=_CLOSE_TIMEOUT_S)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _is_due(in_s: float | None) -> bool:
    return in_s is not None and in_s <= 0


def _wait_s(outlook: Outlook, poll_s: float) -> float:
    """Return the seconds until the next poll: `poll_s`, or less if `outlook` shows that work is due sooner."""
    times = (outlook.lease_in_s, outlook.reclaim_in_s, outlook.late_in_s, outlook.webhook_in_s)
    return min([poll_s, *(seconds for seconds in times if seconds is not None and seconds > 0)])
