"""The Ray Serve deployment of job runners (`jobs.runner`), and `RunnerWaker`, with which ingress replicas wake them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from stable_audio_serve.api.webhook_bodies import webhook_bodies
from stable_audio_serve.core.errors import GenerationError, StorageError
from stable_audio_serve.jobs.open import open_artifacts, open_store
from stable_audio_serve.jobs.runner.runner import JobRunner
from stable_audio_serve.jobs.store.operator_jobs import Waiting
from stable_audio_serve.jobs.store.operator_settings import OperatorSettings
from stable_audio_serve.jobs.store.outbox import Outbox
from stable_audio_serve.jobs.webhooks.notifier import Notifier
from stable_audio_serve.serving.backend import RayBackend
from stable_audio_serve.serving.cores import yield_to_engines
from stable_audio_serve.serving.logs import configure_logging
from stable_audio_serve.serving.metrics import RayMetrics
from stable_audio_serve.serving.model_states import last_prices, reports
from stable_audio_serve.serving.operations import DrainProgress, open_operator_store, predicted_s
from stable_audio_serve.serving.placement import Plan

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

_WAKE_TIMEOUT_S = 5.0
_REPORT_EVERY_S = 1.0
_REPORT_TIMEOUT_S = 5.0
# Seconds between two calls that wake the runners. One call for each submitted job would take much time of the HTTP
# replica and the runners.
_PAUSE_S = 0.1


class JobRunnerReplica:
    """A replica with one job runner. It calls the same model deployments as the ingress replicas."""

    # Ray Serve awaits `__init__`.
    async def __init__(self, plan: Plan, handles: Mapping[str, DeploymentHandle]) -> None:  # type: ignore[misc]
        yield_to_engines()
        settings = plan.settings
        configure_logging(settings.log_level)
        application = serve.get_replica_context().app_name
        self._models = plan.names
        self._handles = handles
        self._reports: dict[str, asyncio.Task[None]] = {}
        backend = RayBackend(plan.catalog, handles, application=application)
        self._status = backend.status
        self._metrics = metrics = RayMetrics()
        store = open_store(settings, identity=plan.store_identity)
        artifacts = open_artifacts(settings, is_prepared=plan.store_identity is not None, metrics=metrics)
        self._store, self._artifacts = store, artifacts
        notifier = Notifier(Outbox(store.database), webhook_bodies(artifacts), settings=settings.jobs, metrics=metrics)
        self._runner = JobRunner(
            store, artifacts, backend=backend, settings=settings, notifier=notifier, metrics=metrics, prices=last_prices
        )
        self._operator_store = open_operator_store(store.database, application)
        # If the database does not answer now, `follow` below reads the settings later.
        with suppress(StorageError):
            self._follow_operators(await asyncio.to_thread(self._operator_store.read))
        await self._runner.start()
        work = (self._operator_store.follow(self._follow_operators), self._report_waiting_work())
        self._tasks = [asyncio.create_task(each) for each in work]

    async def wake(self) -> None:
        """Look for queued jobs now, and not only at the next poll."""
        self._runner.wake()

    async def drain(self) -> int:
        """Put the running jobs back into the queue, because the server is stopping.

        Returns the number of jobs that are not back in the queue yet.
        """
        return self._runner.drain()

    async def _report_waiting_work(self) -> None:
        """Once a second, report to each model's replicas how many seconds of jobs wait for the model.

        A report also says whether an operator keeps the model loaded. A model gets a report only if it has waiting
        jobs, or an operator keeps it loaded, or an operator has released it since the last report. A model that failed
        to load gets none, because Ray Serve tries to load it again only after a while without calls.
        """
        kept: frozenset[str] = frozenset()
        while True:
            kept_before, kept = kept, self._operator_store.current.kept_models
            waiting, statuses = self._runner.waiting_work(), await self._status()
            for model in self._models:
                jobs = (waiting or {}).get(model, Waiting())
                report = self._reports.get(model)
                has_failed = model in statuses and statuses[model].stage == "failed"
                needs_replica = (jobs.num_jobs > 0 or model in kept) and not has_failed
                if report is not None and not report.done():
                    if not needs_replica:
                        report.cancel()  # otherwise this call could start a replica that is not needed any more
                        kept |= kept_before & {model}  # its release is reported next time
                elif needs_replica or model in kept_before:
                    self._reports[model] = asyncio.create_task(
                        self._report(model, jobs, is_kept=model in kept, can_start=needs_replica)
                    )
                if waiting is not None:
                    self._metrics.gauge("waiting_work_ms", 1000.0 * (predicted_s(model, jobs) or 0.0), model=model)
            await asyncio.sleep(_REPORT_EVERY_S)

    async def _report(self, model: str, waiting: Waiting, *, is_kept: bool, can_start: bool) -> None:
        """Send one model's report. If the model has no replica, nothing is sent, except with `can_start`.

        Then the call starts a replica, which answers the call.
        """
        handle, arguments = self._handles[model], (predicted_s(model, waiting) or 0.0, is_kept)
        try:
            if reports(model):
                report = handle.broadcast("note_waiting", *arguments)
                await report.results_async(timeout_s=_REPORT_TIMEOUT_S, return_exceptions=True)
            elif can_start:
                response = handle.note_waiting.remote(*arguments)
                try:
                    await response
                except asyncio.CancelledError:
                    response.cancel()
                    raise
        except (TimeoutError, RayError, RayServeException) as error:
            logger.debug("model %s could not be sent its waiting work: %s", model, error)

    async def drain_progress(self) -> DrainProgress:
        """Return whether this runner is draining, and how many jobs it still has to finish."""
        return DrainProgress(self._runner.is_holding, self._runner.num_held)

    def _follow_operators(self, settings: OperatorSettings) -> None:
        if settings.is_drained:
            self._runner.hold()
        elif self._runner.is_holding:
            self._runner.resume()

    async def check_health(self) -> None:
        """Raise GenerationError if the runner does not work. Called by Ray Serve, which then replaces this replica."""
        self._runner.check_health()
        if any(task.done() for task in self._tasks):
            raise GenerationError("a task of the job runner has ended")

    async def __del__(self) -> None:  # Ray Serve calls this when it stops the replica
        if hasattr(self, "_tasks"):  # `_tasks` is missing if the start failed
            for task in (*self._tasks, *self._reports.values()):
                task.cancel()
            await self._runner.close()
            await self._artifacts.close()
            await asyncio.to_thread(self._store.database.close)


class RunnerWaker:
    """Wakes the job runners when an ingress replica has stored a job.

    If the call to a runner is lost, the runner finds the job when it next polls the queue.
    """

    def __init__(self, runner: DeploymentHandle) -> None:
        self._runner = runner
        self._waking: asyncio.Task[None] | None = None
        self._must_wake = False

    def wake(self) -> None:
        """Wake every runner. If the runners are being woken already, wake them once more afterwards."""
        self._must_wake = True
        if self._waking is None or self._waking.done():
            self._waking = asyncio.create_task(self._wake_all())

    async def _wake_all(self) -> None:
        while self._must_wake:
            self._must_wake = False
            response = self._runner.broadcast("wake")
            try:
                await response.results_async(timeout_s=_WAKE_TIMEOUT_S, return_exceptions=True)
            except (TimeoutError, RayError, RayServeException) as error:
                logger.debug("a job runner could not be woken: %s", error)
            await asyncio.sleep(_PAUSE_S)
