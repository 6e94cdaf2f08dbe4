"""`core.operations.Operations` over Ray Serve, in an ingress replica: what is known here already, never a question to
the models. While somebody looks, one question a second to a job runner, and while the server drains to the processes
that have something to finish. What operators set is kept by `jobs.store.operator_settings`.
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

from stable_audio_serve.core.operations import DrainReport, ModelReport, ServerReport
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.operator_settings import OperatorStore
from stable_audio_serve.jobs.store.waiting import Waiting
from stable_audio_serve.serving.asked import Asked
from stable_audio_serve.serving.backend import RayBackend
from stable_audio_serve.serving.model_states import last_prices, reports

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

_OLD_S = 5.0
_ASK_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class DrainProgress:
    """What one process has to finish, requests or jobs; `has_begun`: it knows that it accepts nothing new."""

    has_begun: bool
    num_left: int


def open_operator_store(database: Database, application: str) -> OperatorStore:
    """Returns what operators set for the application of this Ray cluster.

    Its name outlives Ray's head where that has Redis; a server that is started anew has another one.
    """
    return OperatorStore(database, f"{ray.get_runtime_context().get_session_name()}/{application}")


class RayOperations:
    """One per ingress replica, used on its event loop."""

    def __init__(
        self, backend: RayBackend, settings: OperatorStore, *, ingress: DeploymentHandle, runner: DeploymentHandle
    ) -> None:
        self._backend = backend
        self._settings = settings
        self._ingress = ingress
        self._runner = runner
        self._drain = Asked(self._ask_for_drain, first=DrainReport("draining", None, None))
        self._waiting = Asked(self._ask_for_waiting, first=None)

    async def report(self) -> ServerReport:
        """See `Operations.report`."""
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
                    waiting_jobs_s=predicted_s(name, (waiting or {}).get(name)),
                )
                for name, status in statuses.items()
            },
            drain=drain,
            age_s=age_s,
            reason="Ray Serve's controller does not answer" if age_s > _OLD_S else None,
        )

    async def keep(self, model: str) -> None:
        """See `Operations.keep`."""
        await asyncio.to_thread(self._settings.keep, model)

    async def release(self, model: str) -> None:
        """See `Operations.release`."""
        await asyncio.to_thread(self._settings.release, model)

    async def drain(self) -> None:
        """See `Operations.drain`. Every process hears of it within half a second."""
        await asyncio.to_thread(self._settings.drain)
        self._drain.forget()

    async def resume(self) -> None:
        """See `Operations.resume`."""
        await asyncio.to_thread(self._settings.resume)
        self._drain.forget()

    async def _drain_report(self) -> DrainReport:
        return await self._drain.answer() if self._settings.current.is_drained else DrainReport()

    async def _ask_for_drain(self) -> DrainReport:
        requests, jobs = await asyncio.gather(_progress_of(self._ingress), _progress_of(self._runner))
        all_ = (*requests, *jobs)
        is_done = all(one is not None and one.has_begun and not one.num_left for one in all_)
        return DrainReport("drained" if is_done else "draining", _sum(requests), _sum(jobs))

    async def _ask_for_waiting(self) -> Mapping[str, Waiting] | None:
        """What any of the runners says: each knows of the whole job database."""
        response = self._runner.waiting_jobs.remote()
        try:
            async with asyncio.timeout(_ASK_TIMEOUT_S):
                waiting: Mapping[str, Waiting] | None = await response
                return waiting
        except (TimeoutError, RayError, RayServeException) as error:
            response.cancel()
            logger.debug("no job runner answers: %s", error)
            return None


def predicted_s(model: str, jobs: Waiting | None) -> float | None:
    """Returns the device time of jobs that wait for a model; None while they or its prices are not known."""
    if jobs is None:
        return None
    if not jobs.num_jobs:
        return 0.0
    prices = last_prices(model)
    return None if prices is None else prices.of(jobs.size) / 1000.0


async def _progress_of(deployment: DeploymentHandle) -> Sequence[DrainProgress | None]:
    """What each of its replicas says, None for one that cannot be asked."""
    try:
        answers = await deployment.broadcast("drain_progress").results_async(
            timeout_s=_ASK_TIMEOUT_S, return_exceptions=True
        )
    except (TimeoutError, RayError, RayServeException) as error:
        logger.debug("a deployment does not answer: %s", error)
        return [None]
    return [answer if isinstance(answer, DrainProgress) else None for answer in answers]


def _sum(progress: Sequence[DrainProgress | None]) -> int | None:
    """Returns what all have to finish; None while one is silent, or has yet to hear of the drain."""
    known = [one.num_left for one in progress if one is not None and one.has_begun]
    return sum(known) if len(known) == len(progress) else None
