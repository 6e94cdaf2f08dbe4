"""The job runner. Any number of runners can share a store.

It leases jobs while there is capacity, renews the leases, makes an attempt at each job, and reclaims the jobs of dead
runners. Uses no SQL, no models and no HTTP.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from typing import get_args

import structlog

from stable_audio_serve.artifacts.store import ArtifactStore
from stable_audio_serve.core.backend import Backend
from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.errors import GenerationError, StorageError, UnknownModelError
from stable_audio_serve.core.failpoints import failpoint
from stable_audio_serve.core.generation import Priority
from stable_audio_serve.core.metrics import Metrics, NullMetrics
from stable_audio_serve.core.pricing import Prices, WorkSize
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.jobs.job import Job, State
from stable_audio_serve.jobs.runner.attempt import Attempt, AttemptContext, RunnerPauses, record_end
from stable_audio_serve.jobs.runner.capacity import Capacity, StorageGate
from stable_audio_serve.jobs.runner.execution import JobExecutor
from stable_audio_serve.jobs.runner.heartbeat import LeaseHeartbeat, LeaseId, lease_id
from stable_audio_serve.jobs.runner.sweeper import Sweeper
from stable_audio_serve.jobs.store.health import Refusals
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.runner_jobs import Outlook
from stable_audio_serve.jobs.store.waiting import Waiting
from stable_audio_serve.jobs.webhooks.notifier import Notifier

log = structlog.get_logger("stable_audio_serve.jobs")

_SUM_EVERY_S = 1.0  # seconds between two sums of the waiting work
# Pause after a sum, in multiples of its duration, which is 1.8 ms for 10,000 jobs and 0.3 s for a million.
_SUM_REST = 20.0
_REPLICAS_S = 2.0  # seconds between polls of the number of replicas
_COUNT_S = 15.0  # seconds between counts of jobs by state
_SWEEP_S = 600.0  # seconds between sweeps: retention is counted in days, and a sweep lists the whole store
_SWEEPS_PER_AGE = 6  # with a short `orphan_after_s`, so that files do not stay much longer than that
_SWEEP_SPREAD = 0.5  # intervals vary by up to this share, so that runners do not sweep at the same time
_CLOSE_TIMEOUT_S = 3.0  # time to requeue jobs at shutdown; the leases of jobs that are not requeued expire


class JobRunner:
    """One job runner. `owner` identifies its leases. Use on one event loop."""

    def __init__(
        self,
        store: JobStore,
        artifacts: ArtifactStore,
        *,
        backend: Backend,
        settings: Settings,
        notifier: Notifier | None = None,
        metrics: Metrics | None = None,
        clock: Clock | None = None,
        pauses: RunnerPauses = RunnerPauses(),
        prices: Callable[[str], Prices | None] = lambda model: None,
    ) -> None:
        """Without a notifier no webhooks are sent. `prices` returns the prices last published by a model's engines."""
        clock = clock or SystemClock()
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
        self._capacity = Capacity(
            [card.name for card in backend.catalog],
            prices=prices,
            target_wait_s={model.name: model.replicas.target_wait_s for model in settings.models},
            max_running=self._settings.max_running,
            clock=clock,
        )
        self._context = AttemptContext(
            store=store,
            artifacts=artifacts,
            executor=JobExecutor(backend, artifacts, limits=settings.api, gate=self._gate, clock=clock),
            capacity=self._capacity,
            settings=self._settings,
            pauses=pauses,
            metrics=self._metrics,
            reports={},
        )
        self._heartbeat = LeaseHeartbeat(
            store,
            self.owner,
            lease_s=self._settings.lease_s,
            held=lambda: tuple(self._attempts),  # a single operation, safe on any thread
            on_change=self._stop_changed,
        )
        self._sweeper = Sweeper(store, artifacts, settings=self._settings, metrics=self._metrics, clock=clock)
        self._attempts: dict[LeaseId, Attempt] = {}
        self._outlook: Outlook | None = None
        self._waiting: Mapping[str, Waiting] | None = None
        self._woken = asyncio.Event()
        self.is_holding = False  # set while an operator drains the server: no jobs are leased
        self._is_leasing = False
        self._is_closing = False
        self._loop_task: asyncio.Task[None] | None = None
        self._background: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Reclaim the jobs of dead runners, then run jobs until `close`."""
        with suppress(StorageError):  # the loop will try again
            await self._reclaim()
        self._heartbeat.start()
        if self._notifier is not None:
            self._notifier.start(on_postponed=self.wake)
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
        """Look for work now. Must be called on the runner's event loop."""
        self._woken.set()

    def waiting_work(self) -> Mapping[str, Waiting] | None:
        """Return the waiting work in the store, of each model that has any; None while it is unknown.

        Returns an empty mapping while the artifact store refuses files, because then no replica is needed.
        """
        return self._waiting if self._gate.admits(0) else {}

    def check_health(self) -> None:
        """Raise GenerationError if the loop or the heartbeat has ended unexpectedly."""
        if self._loop_task is None:
            return
        if not self._heartbeat.is_alive or (self._loop_task.done() and not self._is_closing):
            raise GenerationError("the job runner's loop has ended")

    @property
    def num_held(self) -> int:
        """The number of leased jobs, including a job that is being leased."""
        return len(self._attempts) + int(self._is_leasing)

    def hold(self) -> None:
        """Lease no more jobs until `resume`. Jobs in progress continue."""
        self.is_holding = True

    def resume(self) -> None:
        """Lease jobs again."""
        self.is_holding = False
        self.wake()

    def drain(self) -> int:
        """Lease no more jobs and requeue those in progress without counting the attempt. Returns how many still run."""
        self._is_closing = True
        self.wake()
        for attempt in self._attempts.values():
            attempt.stop("closing")
        return len(self._attempts)

    async def close(self) -> None:
        """Stop. Jobs in progress are requeued without counting the attempt."""
        self.drain()
        await _finish({self._loop_task} if self._loop_task else set())
        self.drain()  # includes attempts begun in the last iteration of the loop
        await _finish({attempt.task for attempt in self._attempts.values()})
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._gate.close()
        if self._notifier is not None:
            await self._notifier.close()
        await asyncio.to_thread(self._heartbeat.close)
        await self._context.executor.close()

    async def _run_loop(self) -> None:
        poll_s = self._pauses.first_poll_s
        while not self._is_closing:
            self._woken.clear()
            try:
                self._outlook = outlook = await asyncio.to_thread(self._store.runners.outlook, self.owner)
                num_done = await self._turn(outlook)
            except Exception as error:  # the runner must survive any store error
                is_expected = isinstance(error, StorageError)
                log.error("the job runner cannot use the job database", error=str(error), exc_info=not is_expected)
                wait_s = self._pauses.last_poll_s
            else:
                poll_s = self._pauses.first_poll_s if num_done else min(poll_s * 2, self._pauses.last_poll_s)
                wait_s = _wait_s(outlook, poll_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._woken.wait()

    async def _turn(self, outlook: Outlook) -> int:
        """Do all work that is due. Returns the number of changed jobs, 0 if there was nothing to do."""
        self._metrics.gauge("job_queue_age_s", max(0.0, -(outlook.lease_in_s or 0.0)))
        num_done = 0
        if outlook.num_stops:
            await asyncio.to_thread(self._heartbeat.beat)
        if _is_due(outlook.reclaim_in_s):
            num_done += await self._reclaim()
        if _is_due(outlook.late_in_s):
            for job in await asyncio.to_thread(self._store.runners.expire):
                await record_end(job, self._context)
                num_done += 1
        if _is_due(outlook.webhook_in_s) and self._notifier is not None:
            self._notifier.deliver_due()
        if _is_due(outlook.lease_in_s):
            for priority, num_queued in outlook.queued.items():
                num_done += await self._lease(priority, num_queued)
        return num_done

    async def _reclaim(self) -> int:
        """Requeue the jobs of dead runners. Returns how many there were."""
        # Renew first: after an outage of the store, this runner would otherwise reclaim its own jobs.
        await asyncio.to_thread(self._heartbeat.beat)
        max_attempts = self._settings.max_attempts
        reclaimed = await asyncio.to_thread(self._store.runners.reclaim, max_attempts=max_attempts)
        for job in reclaimed:
            log.warning("job reclaimed", job_id=job.spec.id, attempts=job.attempts, state=job.state)
            if job.is_over:
                await record_end(job, self._context)
        return len(reclaimed)

    async def _lease(self, priority: Priority, num_queued: int) -> int:
        """Lease up to `num_queued` waiting jobs while there is capacity. Returns the number of leased jobs."""
        store, lease_s = self._store.runners, self._settings.lease_s
        num_leased = 0
        while num_leased < num_queued and not (self._is_closing or self.is_holding):
            models = self._capacity.open_models(priority)
            if (models is not None and not models) or not self._gate.admits(self._capacity.num_running):
                break
            self._is_leasing = True
            try:
                job = await asyncio.to_thread(
                    store.lease, self.owner, lease_s=lease_s, models=models, priority=priority
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
            size = WorkSize.of(job.spec.request, model=self._backend.catalog.resolve(job.spec.model))
        except UnknownModelError:  # the attempt will fail with this error
            size = WorkSize()
        self._capacity.begin(lease, model=job.spec.model, priority=job.spec.request.priority, size=size)
        self._attempts[lease] = attempt = Attempt(job, self._context)
        attempt.task.add_done_callback(partial(self._end, lease))

    def _end(self, lease: LeaseId, task: asyncio.Task[None]) -> None:
        del self._attempts[lease]
        self._capacity.end(lease)
        if not task.cancelled() and task.exception() is not None:
            log.error("the outcome of a job could not be handled", job_id=lease.ref.id, exc_info=task.exception())
        self.wake()

    def _stop_changed(self, lost: Collection[LeaseId], to_cancel: Collection[LeaseId]) -> None:
        """Stop jobs whose lease was lost or whose client cancelled them."""
        for lease in (*lost, *to_cancel):
            if lease in self._attempts:
                self._attempts[lease].stop("lost" if lease in lost else "cancelled")

    async def _write_reports(self) -> None:
        """Write the latest progress of all jobs in one transaction."""
        if reports := list(self._context.reports.values()):
            self._context.reports.clear()
            lost = await asyncio.to_thread(self._store.runners.report, reports)
            self._stop_changed([lease_id(job) for job in lost], ())

    async def _count(self) -> None:
        """Update the gauges of jobs by state. All runners report the same figures."""
        counts = await asyncio.to_thread(self._store.operators.counts)
        for state in get_args(State):
            self._metrics.gauge("jobs_by_state", counts.get(state, 0), state=state)

    async def _poll_replicas(self) -> None:
        if self._outlook is None or _is_due(self._outlook.lease_in_s):
            status = await self._backend.status()
            self._capacity.set_replicas({name: model.num_replicas for name, model in status.items()})

    async def _sum_waiting(self) -> None:
        """Sum the waiting work. Makes no query if the queue is empty, and pauses longer after a long query."""
        if self._outlook is None or not self._outlook.num_queued:
            self._waiting = None if self._outlook is None else {}
            return
        started_at = time.monotonic()
        try:
            self._waiting = await asyncio.to_thread(self._store.waiting.by_model)
        except StorageError:
            self._waiting = None
        await asyncio.sleep(_SUM_REST * (time.monotonic() - started_at))


async def _repeat(
    action: Callable[[], Awaitable[object]], *, pause_s: float, first_in_s: float = 0.0, spread: float = 0.0
) -> None:
    """Run `action` repeatedly and log its errors, except for StorageError, which the runner's loop logs.

    Pauses vary at random by up to the share `spread`.
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
    """Wait a few seconds for tasks to end, then cancel the rest."""
    if tasks:
        await asyncio.wait(tasks, timeout=_CLOSE_TIMEOUT_S)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _is_due(in_s: float | None) -> bool:
    return in_s is not None and in_s <= 0


def _wait_s(outlook: Outlook, poll_s: float) -> float:
    """Return the seconds until the next poll, or until work can begin if that is sooner."""
    times = (outlook.lease_in_s, outlook.reclaim_in_s, outlook.late_in_s, outlook.webhook_in_s)
    return min([poll_s, *(seconds for seconds in times if seconds is not None and seconds > 0)])
