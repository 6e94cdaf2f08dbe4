"""Replicas of a model on CPUs answer what its replicas on GPUs refuse for being full: slower, and never where the bytes
must be those of the GPU. A deployment of its own, which is no model to clients.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from stable_audio_serve.core.backend import Backend
from stable_audio_serve.core.catalog import ModelCatalog, ModelStatus
from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.errors import ModelUnavailableError, OverloadedError, QuotaError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, ProgressCallback
from stable_audio_serve.core.metrics import Metrics, NullMetrics
from stable_audio_serve.core.settings import ModelSettings, ReplicaSettings

logger = logging.getLogger(__name__)

_HOLD_S = 1.0  # how long a refusal on CPUs counts, so that a flood of requests does not reach them


def overflow_name(model: str) -> str:
    """Returns the name of the deployment of a model's replicas on CPUs."""
    return f"{model}-cpu-overflow"


def overflow_settings(model: ModelSettings) -> ModelSettings:
    """Returns a model's settings for its replicas on CPUs: without what was chosen for its GPU."""
    unset = ("dtype", "decode_precision", "mode", "num_cpus", "memory_share", "max_memory_bytes", "overflow")
    kept = {"device": "cpu", "num_gpus": 0.0, "compile": False, "quality_report": None}
    replicas = ReplicaSettings(min_replicas=model.overflow_replicas, max_replicas=model.overflow_replicas)
    return model.model_copy(update={**dict.fromkeys(unset), **kept, "replicas": replicas})


def overflow_catalog(catalog: ModelCatalog, models: Mapping[str, object]) -> ModelCatalog:
    """Returns the cards of these models under the names of their deployments on CPUs."""
    return ModelCatalog(
        replace(card, name=overflow_name(card.name), aliases=()) for card in catalog if card.name in models
    )


class PromisingBackend(Backend, Protocol):
    """A `Backend` that expects those whom it refuses again at the time that it named."""

    def withdraw(self, model: str, request: GenerationRequest) -> None:
        """Do not expect the client of a refused request again: it is answered otherwise."""
        ...

    def promise(self, model: str, request: GenerationRequest, *, in_s: float) -> None:
        """Expect the client of a refused request after so many seconds after all."""
        ...


class OverflowBackend:
    """A `Backend` that asks `cpus`, whose models have the names of deployments, where `main` is full."""

    def __init__(
        self, main: PromisingBackend, cpus: Backend, *, metrics: Metrics = NullMetrics(), clock: Clock = SystemClock()
    ) -> None:
        self._main = main
        self._cpus = cpus
        self._metrics = metrics
        self._clock = clock
        self._names = {card.name for card in cpus.catalog}
        self._full: dict[str, tuple[float, float]] = {}  # by model: until when, for deadlines up to these seconds

    @property
    def catalog(self) -> ModelCatalog:
        """The configured models."""
        return self._main.catalog

    async def generate(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
    ) -> GenerationResult:
        """Run one request on any replica of the model, see `Backend.generate`."""
        try:
            return await self._main.generate(model, request, on_progress=on_progress)
        except OverloadedError as refusal:
            if request.exact or isinstance(refusal, QuotaError) or self._is_full(model, request):
                raise
            if not await self._is_ready(model):
                raise
            request = replace(request, in_time=True)
            return await self._overflow(model, request, on_progress=on_progress, refusal=refusal)

    async def _overflow(
        self,
        model: str,
        request: GenerationRequest,
        *,
        on_progress: ProgressCallback | None,
        refusal: OverloadedError,
    ) -> GenerationResult:
        outcome = "failed"
        refused_at = self._clock.monotonic()
        self._main.withdraw(model, request)
        try:
            result = await self._cpus.generate(overflow_name(model), request, on_progress=on_progress)
            outcome = "answered"
            return result
        except (OverloadedError, ModelUnavailableError) as error:
            outcome = "refused"
            self._full[model] = self._clock.monotonic() + _HOLD_S, _deadline_s(request)
            logger.info("refused on CPUs too: model=%s request_id=%s: %s", model, request.request_id, error)
            left_s = (refusal.retry_after_s or 0.0) - (self._clock.monotonic() - refused_at)
            self._main.promise(model, request, in_s=max(0.0, left_s))
            raise refusal from error
        finally:
            self._metrics.increment("overflowed_requests", outcome=outcome, model=model)

    async def status(self) -> Mapping[str, ModelStatus]:
        """Returns what each model is doing, its replicas on CPUs included."""
        main, cpus = await asyncio.gather(self._main.status(), self._cpus.status())
        return {
            name: replace(status, overflow=cpus[overflow_name(name)].stage) if overflow_name(name) in cpus else status
            for name, status in main.items()
        }

    def _is_full(self, model: str, request: GenerationRequest) -> bool:
        """Whether CPUs have just refused a request with at least as much time."""
        until, deadline_s = self._full.get(model, (0.0, 0.0))
        return self._clock.monotonic() < until and _deadline_s(request) <= deadline_s

    async def _is_ready(self, model: str) -> bool:
        """A request would otherwise wait for a replica that is only loading."""
        name = overflow_name(model)
        return name in self._names and (await self._cpus.status())[name].stage == "ready"


def _deadline_s(request: GenerationRequest) -> float:
    return math.inf if request.deadline_s is None else request.deadline_s
