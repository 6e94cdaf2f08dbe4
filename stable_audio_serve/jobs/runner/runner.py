"""Runs waiting jobs, several at a time, beside any number of other runners of the same store.

Leases jobs while the engines have room, renews the leases and takes over the jobs of runners that died. Those that it
leases are `LeasedJobs`. Knows no SQL, no models and no HTTP.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from typing import get_args

import structlog

from stable_audio_serve.artifacts.store import ArtifactStore
from stable_audio_serve.core.backend import Backend
from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.errors import GenerationError, StorageError
from stable_audio_serve.core.metrics import Metrics, NullMetrics
from stable_audio_serve.core.pricing import Prices
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.jobs.job import State
from stable_audio_serve.jobs.runner.attempt import AttemptContext, record_end
from stable_audio_serve.jobs.runner.backlog import WaitingBacklog
from stable_audio_serve.jobs.runner.capacity import Capacity
from stable_audio_serve.jobs.runner.execution import JobExecutor
from stable_audio_serve.jobs.runner.gate import StorageGate
from stable_audio_serve.jobs.runner.leased_jobs import LeasedJobs
from stable_audio_serve.jobs.runner.pauses import RunnerPauses
from stable_audio_serve.jobs.runner.periodic import Periodic
from stable_audio_serve.jobs.runner.reporter import Reporter
from stable_audio_serve.jobs.runner.sweeper import Sweeper
from stable_audio_serve.jobs.store.health import Refusals
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.runner_jobs import Outlook
from stable_audio_serve.jobs.store.waiting import Waiting
from stable_audio_serve.jobs.webhooks.notifier import Notifier

log = structlog.get_logger("stable_audio_serve.jobs")

_SWEEP_SPREAD = 0.5  # several runners start together; they need not sweep together
# Of a model's target wait: jobs that an engine has already count for its replicas, but a new replica does not get them.
_AHEAD_SHARE = 0.5
_CLOSE_TIMEOUT_S = 3.0  # for jobs in progress to be put back; others are taken over when their leases end


class JobRunner:
    """One life of one runner, which is the owner of its leases. Belongs to one event loop."""

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
        """Without a notifier no webhooks are sent. `prices` are what each model's engines published last."""
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
            pauses=pauses,
        )
        self._executor = JobExecutor(backend, artifacts, limits=settings.api, gate=self._gate, clock=clock)
        self._capacity = Capacity(
            [card.name for card in backend.catalog],
            prices=prices,
            ahead_s={"interactive": self._settings.work_ahead_s, "batch": self._settings.batch_ahead_s},
            most_ahead_s={model.name: _AHEAD_SHARE * model.replicas.target_wait_s for model in settings.models},
            max_running=self._settings.max_running,
            clock=clock,
        )
        self._reporter = Reporter(
            store, pause_s=pauses.report_s, on_lost=lambda lost: self._jobs.stop_changed(lost, ())
        )
        self._context = context = AttemptContext(
            store=store,
            artifacts=artifacts,
            executor=self._executor,
            capacity=self._capacity,
            reporter=self._reporter,
            settings=self._settings,
            pauses=pauses,
            metrics=self._metrics,
            clock=clock,
        )
        self._jobs = LeasedJobs(context, owner=self.owner, catalog=backend.catalog, gate=self._gate, on_end=self.wake)
        self._woken = asyncio.Event()
        self._is_closing = False
        self._loop_task: asyncio.Task[None] | None = None
        self._counting = Periodic(self._count, pause_s=pauses.count_s, clock=clock)
        self._asking = Periodic(self._ask_replicas, pause_s=pauses.replicas_s, clock=clock)
        self._backlog = WaitingBacklog(store.waiting.by_model, clock=clock)
        self._weighing = Periodic(self._backlog.refresh, pause_s=0.0, clock=clock)
        sweeper = Sweeper(store, artifacts, settings=self._settings, metrics=self._metrics, clock=clock)
        every_s = self._settings.sweep_every_s
        self._sweeping = Periodic(sweeper.sweep, pause_s=every_s, spread=_SWEEP_SPREAD, first_in_s=every_s, clock=clock)

    async def start(self) -> None:
        """Take over from dead runners, then run jobs until `close`."""
        with suppress(StorageError):  # the loop tries again
            await self._reclaim()
        self._jobs.heartbeat.start()
        if self._notifier is not None:
            self._notifier.start(on_postponed=self.wake)
        self._loop_task = asyncio.create_task(self._run_loop())

    def wake(self) -> None:
        """Look for something to do now. Call it on the runner's event loop."""
        self._woken.set()

    def waiting_work(self) -> Mapping[str, Waiting] | None:
        """Returns how much work waits for each model of any, in the whole store; None while that is not known.

        While this runner starts no jobs because their files cannot be kept, nothing waits for a model.
        """
        return self._backlog.current() if self._gate.admits(0) else {}

    def check_health(self) -> None:
        """Raises GenerationError when the loop or the heartbeat has ended, which they never should."""
        if self._loop_task is None:
            return
        has_ended = self._loop_task.done() and not self._is_closing
        if has_ended or not self._jobs.heartbeat.is_alive:
            raise GenerationError("the job runner's loop has ended")

    @property
    def is_holding(self) -> bool:
        """Whether it leases no jobs."""
        return self._jobs.is_paused

    @property
    def num_held(self) -> int:
        """The jobs that it leases, and one that it may be about to."""
        return len(self._jobs)

    def hold(self) -> None:
        """Lease no more jobs until `resume`; those in progress go on."""
        self._jobs.is_paused = True

    def resume(self) -> None:
        """Lease jobs again."""
        self._jobs.is_paused = False
        self.wake()

    def drain(self) -> int:
        """Lease no more jobs and put back those in progress, which costs no attempt. Returns how many still run."""
        self._is_closing = True
        self.wake()
        return self._jobs.put_back()

    async def close(self) -> None:
        """Stop; jobs in progress are put back and lose no attempt."""
        self.drain()
        await _finish({self._loop_task} if self._loop_task else set())
        self.drain()  # also the attempts begun in the last turn of the loop
        await _finish(self._jobs.tasks)
        for periodic in (self._counting, self._weighing, self._asking, self._sweeping):
            await periodic.close()
        await self._reporter.close()
        await self._gate.close()
        if self._notifier is not None:
            await self._notifier.close()
        await asyncio.to_thread(self._jobs.heartbeat.close)
        await self._executor.close()

    async def _run_loop(self) -> None:
        poll_s = self._pauses.first_poll_s
        while not self._is_closing:
            self._woken.clear()
            self._sweeping.start_if_due()
            try:
                outlook = await asyncio.to_thread(self._store.runners.look, self.owner)
                num_done = await self._turn(outlook)
            except Exception as error:  # the runner outlives whatever its store does
                is_expected = isinstance(error, StorageError)
                log.error("the job runner cannot use its store", error=str(error), exc_info=not is_expected)
                wait_s = self._pauses.last_poll_s
            else:
                poll_s = self._pauses.first_poll_s if num_done else min(poll_s * 2, self._pauses.last_poll_s)
                wait_s = self._wait_s(outlook, poll_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._woken.wait()

    async def _turn(self, outlook: Outlook) -> int:
        """Act on what is due. Returns how many things were done."""
        self._measure(outlook)
        num_done = 0
        if outlook.num_stops:
            await asyncio.to_thread(self._jobs.heartbeat.beat)
        if _is_due(outlook.reclaim_in_s):
            num_done += await self._reclaim()
        if _is_due(outlook.late_in_s):
            for job in await asyncio.to_thread(self._store.runners.expire):
                await record_end(job, self._context)
                num_done += 1
        if _is_due(outlook.webhook_in_s) and self._notifier is not None:
            self._notifier.deliver_due()
        if _is_due(outlook.lease_in_s):
            self._asking.start_if_due()
            for priority, num_queued in outlook.queued.items():
                num_done += await self._jobs.lease(priority, num_queued)
        return num_done

    def _wait_s(self, outlook: Outlook, poll_s: float) -> float:
        """Returns the seconds until the next poll, or until something comes due that is not due already."""
        times = [outlook.lease_in_s, outlook.reclaim_in_s, outlook.late_in_s, outlook.webhook_in_s]
        times.append(self._capacity.opens_in_s())
        return min([poll_s, *(seconds for seconds in times if seconds is not None and seconds > 0)])

    async def _reclaim(self) -> int:
        """Put back the jobs of dead runners. Returns how many there were."""
        await asyncio.to_thread(self._jobs.heartbeat.beat)  # first, or our own jobs are lost when the store was away
        reclaimed = await asyncio.to_thread(
            partial(self._store.runners.reclaim, max_attempts=self._settings.max_attempts)
        )
        for job in reclaimed:
            log.warning("job reclaimed", job_id=job.spec.id, attempts=job.attempts, state=job.state)
            self._metrics.increment("jobs_reclaimed", state=job.state)
            if job.is_over:
                await record_end(job, self._context)
        return len(reclaimed)

    def _measure(self, outlook: Outlook) -> None:
        self._metrics.gauge("jobs_running", self._capacity.num_running)
        self._metrics.gauge("jobs_queued", outlook.num_queued)
        self._metrics.gauge("job_queue_age_s", max(0.0, -(outlook.lease_in_s or 0.0)))
        self._counting.start_if_due()
        if outlook.num_queued:
            self._weighing.start_if_due()
        else:
            self._backlog.none_waits()

    async def _count(self) -> None:
        """Measure how many jobs there are of each state; every runner measures the same."""
        counts = await asyncio.to_thread(self._store.operators.counts)
        for state in get_args(State):
            self._metrics.gauge("jobs_by_state", counts.get(state, 0), state=state)

    async def _ask_replicas(self) -> None:
        status = await self._backend.status()
        self._capacity.set_replicas({name: model.num_replicas for name, model in status.items()})


async def _finish(tasks: Collection[asyncio.Task[None]]) -> None:
    """Wait some time for tasks to end by themselves, then cancel those that have not."""
    if tasks:
        await asyncio.wait(tasks, timeout=_CLOSE_TIMEOUT_S)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _is_due(in_s: float | None) -> bool:
    return in_s is not None and in_s <= 0
