"""Implements `core.operations.Operations` in ingress replicas on Ray Serve.

The states of models come from `model_states`. While clients poll the status, the job database is queried at most once a
second. While the server drains, the ingress replicas and job runners are asked at most once a second how much work they
have left. Operators' settings are stored by `jobs.store.operator_settings`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from stable_audio_serve.core.cached_query import CachedQuery
from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.core.operations import DrainReport, ModelReport, ServerReport
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.operator_jobs import Waiting
from stable_audio_serve.jobs.store.operator_settings import OperatorStore
from stable_audio_serve.serving.backend import RayBackend
from stable_audio_serve.serving.model_states import last_prices, reports

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

_OLD_S = 5.0
_QUERY_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class DrainProgress:
    """How many requests or jobs one process still has to finish while the server drains.

    `has_begun` is true if the process accepts no new work.
    """

    has_begun: bool
    num_left: int


def open_operator_store(database: Database, application: str) -> OperatorStore:
    """Return the store of the operators' settings for an application in this Ray cluster.

    The settings belong to one Ray session. When the server is stopped and started again, they have the defaults again.
    If Ray uses Redis, Ray's session survives a restart of Ray's head node, and so do the settings.
    """
    return OperatorStore(database, f"{ray.get_runtime_context().get_session_name()}/{application}")


class RayOperations:
    """Carries out operators' requests in one ingress replica. Use it on the replica's event loop only."""

    def __init__(
        self,
        backend: RayBackend,
        *,
        jobs: JobStore,
        settings: OperatorStore,
        ingress: DeploymentHandle,
        runner: DeploymentHandle,
    ) -> None:
        self._backend = backend
        self._jobs = jobs
        self._settings = settings
        self._ingress = ingress
        self._runner = runner
        self._drain = CachedQuery(self._query_drain, first=DrainReport("draining", None, None), kept_s=_OLD_S)
        self._waiting = CachedQuery(self._query_waiting, first=None, kept_s=_OLD_S)

    async def report(self) -> ServerReport:
        statuses, waiting, drain = await asyncio.gather(
            self._backend.status(), self._waiting.answer(), self._drain_report()
        )
        kept_models = self._settings.current.kept_models
        age_s = self._backend.status_age_s
        return ServerReport(
            models={
                name: ModelReport(
                    status,
                    is_kept=name in kept_models,
                    replicas=reports(name) if status.states else (),
                    waiting_jobs_s=None if waiting is None else predicted_s(name, waiting.get(name, Waiting())),
                )
                for name, status in statuses.items()
            },
            drain=drain,
            age_s=age_s,
            reason="Ray Serve's controller does not answer" if age_s > _OLD_S else None,
        )

    async def keep(self, model: str) -> None:
        await asyncio.to_thread(self._settings.keep, model)

    async def release(self, model: str) -> None:
        await asyncio.to_thread(self._settings.release, model)

    async def drain(self) -> None:
        """See `Operations.drain`. Every process reads the stored setting within half a second."""
        await asyncio.to_thread(self._settings.drain)
        self._drain.invalidate()

    async def resume(self) -> None:
        await asyncio.to_thread(self._settings.resume)
        self._drain.invalidate()

    async def _drain_report(self) -> DrainReport:
        return await self._drain.answer() if self._settings.current.is_drained else DrainReport()

    async def _query_drain(self) -> DrainReport:
        requests, jobs = await asyncio.gather(_progress_of(self._ingress), _progress_of(self._runner))
        all_ = (*requests, *jobs)
        is_done = all(one is not None and one.has_begun and not one.num_left for one in all_)
        return DrainReport("drained" if is_done else "draining", _sum(requests), _sum(jobs))

    async def _query_waiting(self) -> Mapping[str, Waiting] | None:
        try:
            return await asyncio.to_thread(self._jobs.operators.waiting_work)
        except StorageError:
            return None


def predicted_s(model: str, jobs: Waiting) -> float | None:
    """Return the predicted device time of a model's waiting jobs, in seconds.

    Returns None if there are jobs, but no replica has published prices yet.
    """
    if not jobs.num_jobs:
        return 0.0
    prices = last_prices(model)
    return None if prices is None else prices.of(jobs.size) / 1000.0


async def _progress_of(deployment: DeploymentHandle) -> Sequence[DrainProgress | None]:
    """Return the drain progress of each replica of a deployment, None for a replica that does not answer."""
    try:
        answers = await deployment.broadcast("drain_progress").results_async(
            timeout_s=_QUERY_TIMEOUT_S, return_exceptions=True
        )
    except (TimeoutError, RayError, RayServeException) as error:
        logger.debug("a deployment does not answer: %s", error)
        return [None]
    return [answer if isinstance(answer, DrainProgress) else None for answer in answers]


def _sum(progress: Sequence[DrainProgress | None]) -> int | None:
    """Return the sum of `num_left`, or None if a process does not answer or has not begun to drain."""
    known = [one.num_left for one in progress if one is not None and one.has_begun]
    return sum(known) if len(known) == len(progress) else None
