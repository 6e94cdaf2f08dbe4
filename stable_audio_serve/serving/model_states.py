"""The state of models, as this process knows it: what replicas last published about their work, and their stages, as
Ray Serve's controller sees them. Read by status, health, routing and job runners.

Nothing here wakes a model. What replicas publish comes with the routers' updates, once a second. The controller is
asked at most twice a second; while it does not answer, its last answer counts.
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

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview, ReplicaState

from stable_audio_serve.core.catalog import ModelQuality, ModelStatus
from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.core.operations import ReplicaReport
from stable_audio_serve.core.pricing import Prices
from stable_audio_serve.serving.ray_internals import application_details
from stable_audio_serve.serving.work_ledger import ReplicaWork

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

_TTL_S = 0.5  # an older answer is renewed, those who ask meanwhile get the old one at once
_STALE_S = 2.0  # a caller waits for a newer one than that
_REPLICA_TTL_S = 5.0  # how old the words of replicas on themselves may be
_TIMEOUT_S = 0.8


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """Where a replica runs, how long the stages of its start took (seconds), and what became of its requests.

    `expired` are requests whose own deadline ended them; `backlog_ms` is predicted device time not yet spent.
    """

    device: str
    start_s: Mapping[str, float]
    in_flight: int
    finished: int
    cancelled: int
    expired: int
    failed: int
    backlog_ms: float
    quality: ModelQuality | None


@dataclass(frozen=True, slots=True)
class ReplicaWords:
    """What a replica publishes for operators beside its work."""

    device: str
    dtype: str
    in_flight: int
    rows_per_step: float | None
    finished_per_minute: int

    def to_dict(self) -> dict[str, Any]:
        """Returns what crosses Serve's controller."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class _Heard:
    at: float
    words: Mapping[str, Any]


_heard: dict[str, dict[str, _Heard]] = {}
_prices: dict[str, Prices] = {}
_lock = threading.Lock()


def hear(model: str, words: Mapping[str, Mapping[str, Any]]) -> None:
    """Note which replicas a model has and what each said last. Others are forgotten."""
    now = time.monotonic()
    works = map(ReplicaWork.from_dict, words.values())
    work = next(filter(None, works), None)
    with _lock:
        if work is not None:
            _prices[model] = work.prices
        known = _heard.get(model, {})
        _heard[model] = {
            name: known[name] if name in known and known[name].words == word else _Heard(now, word)
            for name, word in words.items()
        }


def last_prices(model: str) -> Prices | None:
    """Returns what a replica of a model asked last, though there may be none any more; None before one has said it."""
    return _prices.get(model)


def reports(model: str) -> tuple[ReplicaReport, ...]:
    """Returns what is known of each replica of a model, in order of their names."""
    now = time.monotonic()
    with _lock:
        heard = sorted(_heard.get(model, {}).items())
    return tuple(_report(name, one.words, age_s=now - one.at) for name, one in heard)


def _report(name: str, words: Mapping[str, Any], *, age_s: float) -> ReplicaReport:
    """What another version says differently is not known."""
    backlog_ms, rows = words.get("backlog_ms"), words.get("rows_per_step")
    return ReplicaReport(
        name,
        age_s,
        device=words.get("device"),
        dtype=words.get("dtype"),
        in_flight=words.get("in_flight"),
        backlog_s=None if backlog_ms is None else float(backlog_ms) / 1000.0,
        rows_per_step=None if rows is None else float(rows),
        finished_per_minute=words.get("finished_per_minute"),
    )


def read_application(name: str) -> ApplicationStatusOverview | None:
    """Returns the status of an application and of its deployments, None where Serve or the application does not run.

    `serve.status` takes twenty times as long: for each deployment it imports and pickles the request router again.
    Blocking. Raises RayError where the controller does not answer.
    """
    told = application_details(name)
    if told is None:
        return None
    deployments = {
        deployment: DeploymentStatusOverview(
            status=each["status"],
            status_trigger=each["status_trigger"],
            replica_states=dict(Counter(replica["state"] for replica in each["replicas"])),
            message=each["message"],
        )
        for deployment, each in told["deployments"].items()
    }
    return ApplicationStatusOverview(told["status"], told["message"], told["last_deployed_time_s"], deployments)


@dataclass(frozen=True, slots=True)
class _Snapshot:
    taken_at: float
    models: Mapping[str, ModelStatus]


class ModelWatch:
    """Used on one event loop."""

    def __init__(
        self, names: Iterable[str], handles: Mapping[str, DeploymentHandle], *, application: str, metrics: Metrics
    ) -> None:
        """`names` are those of the models and of their deployments in `application`."""
        self._names = tuple(names)
        self._handles = handles
        self._application = application
        self._metrics = metrics
        self._replicas: dict[str, tuple[ReplicaStatus, ...]] = {}
        self._asked_at: dict[str, float] = {}
        self._snapshot = _Snapshot(float("-inf"), {name: ModelStatus(stage="loading") for name in self._names})
        self._refresh: asyncio.Task[None] | None = None
        self._refresh_began_at = float("-inf")
        self._looked_at = float("-inf")

    async def status(self) -> Mapping[str, ModelStatus]:
        """Returns what each model is doing as the controller sees it, at most `_STALE_S` old.

        Older where the controller does not answer, as while Ray's head is away: then nobody waits for it for long.
        """
        now = time.monotonic()
        age_s = now - self._snapshot.taken_at
        if age_s > _TTL_S and (self._refresh is None or self._refresh.done()):
            self._refresh, self._refresh_began_at = asyncio.create_task(self._take_snapshot()), now
        patience_s = self._refresh_began_at + _TIMEOUT_S - now
        if age_s > _STALE_S and self._refresh is not None and patience_s > 0:
            await asyncio.wait({self._refresh}, timeout=patience_s)
        return self._snapshot.models

    @property
    def age_s(self) -> float:
        """How long ago the controller said what `status` returns; infinite before it first did."""
        return time.monotonic() - self._looked_at

    def note_answer(self, model: str) -> None:
        """Count an answer as proof, also while the controller cannot be asked, and ask it soon for the rest."""
        models = self._snapshot.models
        if models[model].stage == "ready":
            return
        known = replace(models[model], stage="ready", num_replicas=max(1, models[model].num_replicas))
        self._snapshot = _Snapshot(float("-inf"), {**models, model: known})

    async def _take_snapshot(self) -> None:
        try:
            application = await asyncio.to_thread(read_application, self._application)
        except RayError as error:
            logger.warning("the Serve controller does not answer: %s", error)
            return
        if application is None:
            return
        stages = {name: _stage(application, name) for name in self._names}
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
            async with asyncio.timeout(_TIMEOUT_S):
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
            quality=_most_telling(replica.quality for replica in replicas),
            refused_update=_refused_update(deployment) if deployment else None,
            states=_states(deployment) if deployment else {},
        )


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


def _most_telling(qualities: Iterable[ModelQuality | None]) -> ModelQuality | None:
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
