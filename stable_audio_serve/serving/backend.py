"""The API's Backend over Ray Serve model handles: deadlines, one retry, errors of ours instead of Ray's.

Runs inside an ingress replica. Never touches a model, and asking how models are never wakes one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    RequestCancelledError,
)
from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview, ReplicaState

from stable_audio_serve.core.catalog import ModelCatalog, ModelQuality, ModelStatus
from stable_audio_serve.core.errors import (
    DeadlineExceededError,
    GenerationError,
    ModelUnavailableError,
    QueueFullError,
    StableAudioError,
)
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, Progress, ProgressCallback
from stable_audio_serve.core.metrics import Metrics, NullMetrics
from stable_audio_serve.serving.overload import OverloadGuard

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

    from stable_audio_serve.serving.replica import ReplicaStatus

logger = logging.getLogger(__name__)

_ATTEMPTS = 2  # generation is pure once the seed is fixed, so one replica's death costs one retry
_DEADLINE_GRACE_S = 2.0  # the engine ends a late request itself; this is for an engine that cannot
_RETRY_AFTER_S = 5.0
_LOAD_CHECK_S = 1.0  # how often a request that is held looks whether its model can load at all
_STATUS_TTL_S = 0.5  # older ones are renewed, those who ask meanwhile get the old one at once
_STATUS_STALE_S = 2.0  # a caller waits for a newer one than that
_REPLICA_TTL_S = 5.0  # how old the words of replicas on themselves may be
_STATUS_TIMEOUT_S = 0.8  # the last answer is better than a late one


@dataclass(frozen=True, slots=True)
class _Snapshot:
    taken_at: float
    models: Mapping[str, ModelStatus]


class RayBackend:
    """Runs generations on the deployment named like the model."""

    def __init__(
        self,
        catalog: ModelCatalog,
        handles: Mapping[str, DeploymentHandle],
        *,
        application: str,
        metrics: Metrics = NullMetrics(),
    ) -> None:
        self._catalog = catalog
        self._metrics = metrics
        self._handles = handles
        self._application = application
        self._guards = {card.name: OverloadGuard() for card in catalog}
        self._replicas: dict[str, tuple[ReplicaStatus, ...]] = {}
        self._asked_at: dict[str, float] = {}
        self._snapshot = _Snapshot(float("-inf"), {card.name: ModelStatus(stage="loading") for card in catalog})
        self._refresh: asyncio.Task[None] | None = None
        self._refresh_began_at = float("-inf")
        self._looked_at = float("-inf")

    @property
    def catalog(self) -> ModelCatalog:
        """The configured models."""
        return self._catalog

    async def generate(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
    ) -> GenerationResult:
        """Run one request on any replica of the model, see `Backend.generate`.

        While the model is full, interactive requests are refused here; batch ones come from few callers that wait.
        """
        if request.priority == "batch":
            return await self._run(model, request, on_progress=on_progress)
        guard = self._guards[model]
        request = guard.enter(request)
        try:
            result = await self._run(model, request, on_progress=on_progress)
        except QueueFullError as error:
            raise guard.refuse(request, error) from error
        guard.done()
        return result

    async def _run(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None
    ) -> GenerationResult:
        """Run one request, and once more if its replica was lost."""
        loop = asyncio.get_running_loop()
        deadline_at = None if request.deadline_s is None else loop.time() + request.deadline_s
        for attempts_left in reversed(range(_ATTEMPTS)):
            remaining_s = None if deadline_at is None else deadline_at - loop.time()
            try:
                return await self._attempt(model, replace(request, deadline_s=remaining_s), on_progress=on_progress)
            except RayError as error:  # the replica died, or what it made was lost with its node
                logger.warning("a replica was lost: model=%s request_id=%s error=%s", model, request.request_id, error)
                if not attempts_left:
                    raise ModelUnavailableError(
                        f"model {model} lost its replica twice while working on this request",
                        retry_after_s=_RETRY_AFTER_S,
                    ) from error
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _attempt(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None
    ) -> GenerationResult:
        """One call on one replica. Raises RayError when the replica or its answer was lost, else errors of ours."""
        if request.deadline_s is not None and request.deadline_s <= 0:
            raise DeadlineExceededError("the time budget of this request ran out")
        bound_s = None if request.deadline_s is None else request.deadline_s + _DEADLINE_GRACE_S
        response = self._call(model, request, is_reporting=on_progress is not None)
        watcher = asyncio.create_task(self._cancel_if_unloadable(model, response))
        try:
            async with asyncio.timeout(bound_s):
                result = await _receive(response, on_progress)
        except TimeoutError as error:
            response.cancel()  # giving up on a handle does not stop the replica
            raise DeadlineExceededError("the time budget of this request ran out") from error
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError as error:
            raise QueueFullError("too many requests are waiting", retry_after_s=_RETRY_AFTER_S) from error
        except (DeploymentUnavailableError, RequestCancelledError) as error:
            raise _unloadable(model) from error
        except RayTaskError as error:  # nothing we expect: its text is for the log only
            logger.error("a replica failed: %s", error)
            raise GenerationError("the generation failed") from error
        finally:
            watcher.cancel()
        if self._snapshot.models[model].stage != "ready":
            self._note_ready(model)
        if isinstance(result, StableAudioError):
            raise result
        return result

    def _call(
        self, model: str, request: GenerationRequest, *, is_reporting: bool
    ) -> DeploymentResponse | DeploymentResponseGenerator:
        handle = self._handles[model]
        if is_reporting:
            return handle.options(stream=True).generate_reporting.remote(request)
        return handle.generate.remote(request)

    async def _cancel_if_unloadable(
        self, model: str, response: DeploymentResponse | DeploymentResponseGenerator
    ) -> None:
        """Serve may hold a request for a model without replicas for ever, even if it can never load."""
        while True:
            await asyncio.sleep(_LOAD_CHECK_S)
            if (await self.status())[model].stage == "failed":
                response.cancel()
                return

    def _note_ready(self, model: str) -> None:
        """Count an answer as proof, also while the controller cannot be asked, and ask it soon for the rest."""
        models = self._snapshot.models
        known = replace(models[model], stage="ready", num_replicas=max(1, models[model].num_replicas))
        self._snapshot = _Snapshot(float("-inf"), {**models, model: known})

    async def status(self) -> Mapping[str, ModelStatus]:
        """Returns what each model is doing as the controller sees it, at most `_STATUS_STALE_S` old.

        Older where the controller does not answer, as while Ray's head is away: then nobody waits for it for long.
        """
        now = time.monotonic()
        age_s = now - self._snapshot.taken_at
        if age_s > _STATUS_TTL_S and (self._refresh is None or self._refresh.done()):
            self._refresh, self._refresh_began_at = asyncio.create_task(self._take_snapshot()), now
        patience_s = self._refresh_began_at + _STATUS_TIMEOUT_S - now
        if age_s > _STATUS_STALE_S and self._refresh is not None and patience_s > 0:
            await asyncio.wait({self._refresh}, timeout=patience_s)
        return self._snapshot.models

    @property
    def status_age_s(self) -> float:
        """How long ago the controller said what `status` returns; infinite before it first did."""
        return time.monotonic() - self._looked_at

    async def _take_snapshot(self) -> None:
        try:
            application = (await asyncio.to_thread(serve.status)).applications.get(self._application)
        except RayError as error:
            logger.warning("the Serve controller does not answer: %s", error)
            return
        if application is None:
            return
        stages = {card.name: _stage(application, card.name) for card in self._catalog}
        await asyncio.gather(*(self._ask_replica(name) for name, stage in stages.items() if stage == "ready"))
        self._looked_at = time.monotonic()
        self._snapshot = _Snapshot(
            self._looked_at,
            {name: self._model_status(name, stage, application=application) for name, stage in stages.items()},
        )
        for name, status in self._snapshot.models.items():
            self._metrics.gauge("model_update_refused", float(status.refused_update is not None), model=name)

    async def _ask_replica(self, name: str) -> None:
        """Learn what the running replicas say of themselves, again after a while: an update puts others in their place.

        The first time it also opens the connection to one before the first real request.
        """
        now = time.monotonic()
        if now - self._asked_at.get(name, float("-inf")) < _REPLICA_TTL_S:
            return
        handle, is_first = self._handles[name], name not in self._replicas
        response = handle.status.remote() if is_first else None
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT_S):
                if response is not None:
                    self._replicas[name] = (await response,)
                answers = await handle.broadcast("status").results_async(return_exceptions=True)
        except (TimeoutError, RayError, RayServeException):
            if response is not None:
                response.cancel()
            return
        if replicas := tuple(answer for answer in answers if not isinstance(answer, BaseException)):
            self._replicas[name], self._asked_at[name] = replicas, now

    def _model_status(self, name: str, stage: str, *, application: ApplicationStatusOverview) -> ModelStatus:
        replicas = self._replicas.get(name, ())
        replica = next(iter(replicas), None)
        deployment = application.deployments.get(name)
        return ModelStatus(
            stage=stage,
            num_replicas=_count(deployment, ReplicaState.RUNNING) if deployment else 0,
            device=replica.device if replica else None,
            detail={key: f"{seconds:.2f}" for key, seconds in replica.start_s.items()} if replica else None,
            quality=most_telling(replica.quality for replica in replicas),
            refused_update=_refused_update(deployment) if deployment else None,
            states=_states(deployment) if deployment else {},
        )


async def _receive(
    response: DeploymentResponse | DeploymentResponseGenerator, on_progress: ProgressCallback | None
) -> GenerationResult | StableAudioError:
    """Returns the replica's final answer to either kind of call."""
    if on_progress is None:
        return await response
    async for item in response:
        if not isinstance(item, Progress):
            return item
        on_progress(item)
    raise ModelUnavailableError("the replica stopped in the middle of this request", retry_after_s=_RETRY_AFTER_S)


def _unloadable(model: str) -> ModelUnavailableError:
    """Returns an error without Retry-After: Serve does not restart a failed deployment until it is deployed again."""
    return ModelUnavailableError(f"model {model} failed to load; the server's log says why")


def _stage(application: ApplicationStatusOverview, name: str) -> str:
    deployment = application.deployments.get(name)
    if deployment is None:
        return "loading"
    if _count(deployment, ReplicaState.RUNNING):
        return "ready"
    is_starting = _count(deployment, ReplicaState.STARTING) > 0
    has_failed = deployment.status == "DEPLOY_FAILED" or deployment.status_trigger == "REPLICA_STARTUP_FAILED"
    if has_failed and not is_starting:
        return "failed"
    if deployment.status == "UPSCALING":
        return "waking"
    # An unhealthy one has lost its replicas and is about to start others.
    return "loading" if is_starting or deployment.status in ("UPDATING", "UNHEALTHY") else "idle"


def most_telling(qualities: Iterable[ModelQuality | None]) -> ModelQuality | None:
    """Returns the quality that an operator has to hear of first, None where none is known."""
    order = ("fallback", "unchecked", "off", "passed")
    return min(filter(None, qualities), key=lambda quality: order.index(quality.gate), default=None)


def _refused_update(deployment: DeploymentStatusOverview) -> str | None:
    """Returns a sentence where new replicas failed to start and older ones answer; the reason is in the log."""
    if deployment.status != "DEPLOY_FAILED" or not _count(deployment, ReplicaState.RUNNING):
        return None
    return "the replicas of the last deployment failed to start, the ones before it answer; the server's log says why"


def _states(deployment: DeploymentStatusOverview) -> Mapping[str, int]:
    # Ray gives the states as text or as their enumeration, which is text too.
    counts = deployment.replica_states.items()
    return {ReplicaState(state).value.lower(): int(number) for state, number in counts if number}


def _count(deployment: DeploymentStatusOverview, state: ReplicaState) -> int:
    return int(deployment.replica_states.get(state, 0))
