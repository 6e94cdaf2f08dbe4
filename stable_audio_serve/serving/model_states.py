"""The state of each model as known in this process. Used by the status, health checks, routing and job runners.

There are two sources. Replicas publish statistics once a second, which reach this process through Ray Serve's request
routers. Ray Serve's controller reports the stage of each deployment. This process polls the controller at most twice a
second. While the controller does not answer, its last answer is used. Reading the state never starts a replica.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from ray.exceptions import RayError
from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview, ReplicaState

from stable_audio_serve.core.cached_query import CachedQuery
from stable_audio_serve.core.catalog import ModelQuality, ModelStatus
from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.core.operations import ReplicaReport
from stable_audio_serve.core.pricing import Prices
from stable_audio_serve.serving.ray_internals import application_details
from stable_audio_serve.serving.work_ledger import parse_work

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

_FRESH_S = 0.5  # if the status is older, the controller is asked again
_USABLE_S = 2.0  # if the status is older, callers wait for the controller; otherwise a busy one would delay each probe
# Replicas in these states answer requests. A replica is PENDING_MIGRATION while its node is drained, and RECOVERING
# until a restarted controller has reached it.
_ANSWERING = (ReplicaState.RUNNING, ReplicaState.PENDING_MIGRATION, ReplicaState.RECOVERING)
# The fields of a report that have the same names and values in a replica's statistics.
_AS_PUBLISHED = ("device", "dtype", "profile", "memory_bytes", "requests", "rows_per_step", "requests_per_minute")
_QUALITY = TypeAdapter(ModelQuality | None)


@dataclass(slots=True)
class _Received:
    at: float
    stats: Mapping[str, Any]


_received: dict[str, dict[str, _Received]] = {}
_prices: dict[str, Prices] = {}
_lock = threading.Lock()


def record_stats(model: str, stats: Mapping[str, Mapping[str, Any]]) -> None:
    """Record the latest statistics of all replicas of a model. The keys of `stats` are the replicas' names.

    If a replica is missing in `stats`, its earlier statistics are dropped.
    """
    now = time.monotonic()
    works = map(parse_work, stats.values())
    work = next(filter(None, works), None)
    with _lock:
        if work is not None:
            _prices[model] = work.prices
        known = _received.get(model, {})
        _received[model] = {
            name: known[name] if name in known and known[name].stats == each else _Received(now, each)
            for name, each in stats.items()
        }


def last_prices(model: str) -> Prices | None:
    """Return the last prices that a replica of the model published, even if that replica has ended since.

    Returns None if no replica has published prices yet.
    """
    return _prices.get(model)


def reports(model: str) -> tuple[ReplicaReport, ...]:
    """Return a report for each replica of a model, sorted by name."""
    now = time.monotonic()
    with _lock:
        received = sorted(_received.get(model, {}).items())
    return tuple(_report(name, last.stats, age_s=now - last.at) for name, last in received)


def _report(name: str, stats: Mapping[str, Any], *, age_s: float) -> ReplicaReport:
    """Return a replica's report. Fields that the replica's version of this package does not publish are None."""
    backlog_ms = stats.get("backlog_ms")
    return ReplicaReport(
        name,
        age_s,
        backlog_s=None if backlog_ms is None else backlog_ms / 1000.0,
        start_s=stats.get("start_s") or {},
        quality=_quality(stats.get("quality")),
        **{field: stats.get(field) for field in _AS_PUBLISHED},
    )


def _quality(values: Mapping[str, Any] | None) -> ModelQuality | None:
    try:
        return _QUALITY.validate_python(values)
    except ValidationError:  # it was published by a replica with another version of this package
        return None


def read_application(name: str) -> ApplicationStatusOverview | None:
    """Return the status of an application and its deployments, or None if Ray Serve or the application does not run.

    This is twenty times as fast as `serve.status`, which imports and pickles each deployment's request router.
    Blocking. Raises RayError if Ray Serve's controller does not answer.
    """
    details = application_details(name)
    if details is None:
        return None
    deployments = {
        deployment: DeploymentStatusOverview(
            status=each["status"],
            status_trigger=each["status_trigger"],
            replica_states=dict(Counter(replica["state"] for replica in each["replicas"])),
            message=each["message"],
        )
        for deployment, each in details["deployments"].items()
    }
    return ApplicationStatusOverview(
        details["status"], details["message"], details["last_deployed_time_s"], deployments
    )


class ModelWatch:
    """Knows the status of all models. Use from one event loop."""

    def __init__(
        self, names: Iterable[str], handles: Mapping[str, DeploymentHandle], *, application: str, metrics: Metrics
    ) -> None:
        """`names` are the names of the models, and also of their deployments in `application`."""
        self._names = tuple(names)
        self._handles = handles
        self._application = application
        self._metrics = metrics
        self._models: Mapping[str, ModelStatus] = {name: ModelStatus(stage="loading") for name in self._names}
        self._answered_at = float("-inf")
        self._controller = CachedQuery(self._ask, first=None, fresh_s=_FRESH_S, usable_s=_USABLE_S)

    async def status(self) -> Mapping[str, ModelStatus]:
        """Return the status of each model as Ray Serve's controller reported it, at most `_USABLE_S` ago.

        If the controller does not answer within a second, for example because Ray's head node restarts, return the last
        status, however old it is. The fields that replicas publish are always the latest.
        """
        await self._controller.refresh()
        return {name: _with_reports(name, status) for name, status in self._models.items()}

    def last(self, model: str) -> ModelStatus:
        """Return the last known status of a model, without the fields that replicas publish."""
        return self._models[model]

    @property
    def age_s(self) -> float:
        """Seconds since Ray Serve's controller last answered. Infinite if it has not answered yet."""
        return time.monotonic() - self._answered_at

    def note_answer(self, model: str) -> None:
        """Mark a model as ready because a replica of it has answered a request.

        `status` reports this until the controller answers again.
        """
        last = self._models[model]
        if last.stage != "ready":
            ready = replace(last, stage="ready", num_replicas=max(1, last.num_replicas))
            self._models = {**self._models, model: ready}

    async def _ask(self) -> None:
        try:
            application = await asyncio.to_thread(read_application, self._application)
        except RayError as error:
            logger.warning("the Serve controller does not answer: %s", error)
            return
        if application is None:
            return
        self._answered_at = time.monotonic()
        if not application.deployments:
            # While Ray Serve builds an update, and after it refused one, it lists no deployments, but their replicas
            # run. So the last stages are kept.
            return
        stages = {name: _stage(application, name) for name in self._names}
        for name, stage in stages.items():
            if stage == "ready":
                self._handles[name].options()  # starts the model's router, which then receives statistics
        self._models = {name: _model_status(name, stage, application=application) for name, stage in stages.items()}
        for name, status in self._models.items():
            self._metrics.gauge("model_update_refused", float(status.refused_update is not None), model=name)


def _model_status(name: str, stage: str, *, application: ApplicationStatusOverview) -> ModelStatus:
    """Return the status of a model without the fields that replicas publish."""
    deployment = application.deployments.get(name)
    return ModelStatus(
        stage=stage,
        num_replicas=_count(deployment, *_ANSWERING) if deployment else 0,
        refused_update=_refused_update(deployment) if deployment else None,
        states=_states(deployment) if deployment else {},
    )


def _with_reports(name: str, status: ModelStatus) -> ModelStatus:
    """Return a model's status with the fields that its replicas publish."""
    replicas = [replica for replica in reports(name) if replica.device]  # the others have not published yet
    if not replicas:
        return status
    return replace(
        status,
        device=replicas[0].device,
        detail={stage: f"{seconds:.2f}" for stage, seconds in replicas[0].start_s.items()},
        quality=_worst_quality(replica.quality for replica in replicas),
    )


def _stage(application: ApplicationStatusOverview, name: str) -> str:
    deployment = application.deployments.get(name)
    if deployment is None:
        return "loading"
    if _count(deployment, *_ANSWERING):
        return "ready"
    is_starting = _count(deployment, ReplicaState.STARTING) > 0
    has_failed = deployment.status == "DEPLOY_FAILED" or deployment.status_trigger == "REPLICA_STARTUP_FAILED"
    # In an unhealthy deployment, all replicas have died, and Ray Serve starts new ones, without end if they fail.
    is_unhealthy = deployment.status == "UNHEALTHY"
    if has_failed and (is_unhealthy or not is_starting):
        return "failed"
    if deployment.status == "UPSCALING":
        return "waking"
    return "loading" if is_starting or is_unhealthy or deployment.status == "UPDATING" else "idle"


def _worst_quality(qualities: Iterable[ModelQuality | None]) -> ModelQuality | None:
    """Return the quality with the worst result at the quality gate, or None if `qualities` has none."""
    order = ("fallback", "unchecked", "off", "passed")
    return min(filter(None, qualities), key=lambda quality: order.index(quality.gate), default=None)


def _refused_update(deployment: DeploymentStatusOverview) -> str | None:
    """Return a message if the new replicas of an update failed to start and older replicas still answer requests.

    Otherwise return None.
    """
    if deployment.status != "DEPLOY_FAILED" or not _count(deployment, *_ANSWERING):
        return None
    return "the new replicas failed to start and the older ones still answer; see the server's log"


def _states(deployment: DeploymentStatusOverview) -> Mapping[str, int]:
    return {state.lower(): number for state, number in deployment.replica_states.items()}


def _count(deployment: DeploymentStatusOverview, *states: ReplicaState) -> int:
    return sum(deployment.replica_states.get(state, 0) for state in states)
