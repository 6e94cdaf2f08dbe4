"""`core.operations.Operations` over Ray Serve, in an ingress replica: what is known here already, never a question to
the models; only while the server drains, one question a second to the processes that have something to finish.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.core.operations import DrainReport, ModelReport, ServerReport
from stable_audio_serve.serving import notes
from stable_audio_serve.serving.backend import RayBackend
from stable_audio_serve.serving.heard import reports
from stable_audio_serve.serving.kept_models import keep, kept, release
from stable_audio_serve.serving.placement import INGRESS_NAME

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

_OLD_S = 5.0
_ASK_EVERY_S = 1.0
_ASK_TIMEOUT_S = 2.0
_PATIENCE_S = 1.0
_DRAIN = "drain"
_WANTED = "wanted"


@dataclass(frozen=True, slots=True)
class DrainProgress:
    """What one process has to finish, requests or jobs; `has_begun`: it knows that it accepts nothing new."""

    has_begun: bool
    num_left: int


def is_drain_wanted(application: str) -> bool | None:
    """Whether operators take this server out, as it was half a second ago; None = not known yet. Does not wait."""
    noted = notes.watched(_DRAIN, application=application)
    return None if noted is None else _WANTED in noted


def read_drain_wanted(application: str) -> bool:
    """`is_drain_wanted` as it is now, for a process that starts. Blocking; False while Ray's head does not answer."""
    try:
        return _WANTED in notes.read(_DRAIN, application=application)
    except StorageError:
        return False


class RayOperations:
    """One per ingress replica, used on its event loop."""

    def __init__(self, backend: RayBackend, *, runner: DeploymentHandle, application: str) -> None:
        self._backend = backend
        self._runner = runner
        self._ingress: DeploymentHandle | None = None
        self._application = application
        self._drain = DrainReport()
        self._asked_at = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    async def report(self) -> ServerReport:
        """See `Operations.report`."""
        statuses = await self._backend.status()
        kept_now = kept(self._application)
        age_s = self._backend.status_age_s
        return ServerReport(
            models={
                name: ModelReport(status, is_kept=name in kept_now, replicas=reports(name) if status.states else ())
                for name, status in statuses.items()
            },
            drain=await self._drain_report(),
            age_s=age_s,
            reason="Ray Serve's controller does not answer" if age_s > _OLD_S else None,
        )

    async def keep(self, model: str) -> None:
        """See `Operations.keep`."""
        await asyncio.to_thread(keep, model, application=self._application)

    async def release(self, model: str) -> None:
        """See `Operations.release`."""
        await asyncio.to_thread(release, model, application=self._application)

    async def drain(self) -> None:
        """See `Operations.drain`. Every process looks for the note twice a second."""
        await asyncio.to_thread(notes.note, _DRAIN, _WANTED, application=self._application)
        self._forget()

    async def resume(self) -> None:
        """See `Operations.resume`."""
        await asyncio.to_thread(notes.erase, _DRAIN, _WANTED, application=self._application)
        self._forget()

    def _forget(self) -> None:
        self._asked_at = float("-inf")

    async def _drain_report(self) -> DrainReport:
        if not is_drain_wanted(self._application):
            return DrainReport()
        if self._asking is None or self._asking.done():
            if time.monotonic() - self._asked_at < _ASK_EVERY_S:
                return self._drain
            self._asking = asyncio.create_task(self._ask())
        await asyncio.wait({self._asking}, timeout=_PATIENCE_S)
        return self._drain if self._drain.state != "no" else DrainReport("draining", None, None)

    async def _ask(self) -> None:
        if self._ingress is None:  # there is none before the application is deployed
            self._ingress = serve.get_deployment_handle(INGRESS_NAME, self._application)
        requests, jobs = await asyncio.gather(_progress_of(self._ingress), _progress_of(self._runner))
        all_ = (*requests, *jobs)
        is_done = all(one is not None and one.has_begun and not one.num_left for one in all_)
        self._drain = DrainReport("drained" if is_done else "draining", _sum(requests), _sum(jobs))
        self._asked_at = time.monotonic()


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
