"""Implements `core.backend.Backend` with calls to model deployments, in ingress replicas and job runners.

A call applies the request's deadline, retries once if a replica dies, and raises errors of `core.errors` in place of
Ray's exceptions. Whether a request is refused is decided by the replica's engine.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError

from stable_audio_serve.core.catalog import ModelCatalog, ModelStatus
from stable_audio_serve.core.errors import (
    DeadlineExceededError,
    GenerationError,
    ModelRestartingError,
    ModelUnavailableError,
    OverloadedError,
    StableAudioError,
)
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, Progress, ProgressCallback
from stable_audio_serve.core.metrics import Metrics, NullMetrics
from stable_audio_serve.serving.model_states import ModelWatch, last_prices

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

logger = logging.getLogger(__name__)

_ATTEMPTS = 2  # if a replica dies, its request can be repeated with the same result, because the seed is fixed
_DEADLINE_GRACE_S = 2.0  # the engine ends a request at its deadline; if it hangs, the call ends this much later
_RETRY_AFTER_S = 5.0
_RESTART_RETRY_S = 30.0
_JITTER = 0.25  # up to this share of the retry time is added to it at random
_MAX_REPEAT_S = 1.0  # longest time for which requests are refused without a call to a replica
_MAX_REFUSALS = 1000
# Longest retry time that comes from earlier refusals. Clients that never come back must not delay others for longer.
_MOST_RETRY_S = 600.0
_LOAD_CHECK_S = 1.0  # while a request waits: seconds between checks whether its model has failed to load


@dataclass(slots=True)
class _Refusal:
    """The last refusal that a client got from a full model. Times are in seconds of the event loop's clock."""

    error: OverloadedError
    ms: float  # predicted device time of the refused request
    full_until: float
    retry_at: float  # when the request that was refused last may be sent again

    def repeat(self, now: float, *, ms: float) -> OverloadedError:
        """Return the error for one more refused request. It is retried later than the last one, by its device time."""
        self.retry_at = min(self.retry_at + max(self.error.work_s, ms / 1000.0), now + _MOST_RETRY_S)
        return OverloadedError(self.error.message, retry_after_s=self.retry_at - now)


class _Refusals:
    """The last refusal of each caller. A caller is a client, a model and a priority.

    While a model is full, further requests that are at least as long are refused here, without a call to a replica. The
    call would take several times as long, because the replica's event loop shares the interpreter with its engine.

    Requests are compared by `ms`, their predicted device time in milliseconds. It is infinite if it is not known.
    """

    def __init__(self) -> None:
        self._refusals: dict[tuple[str, str, str], _Refusal] = {}

    def check(self, caller: tuple[str, str, str], *, ms: float) -> None:
        """Raise OverloadedError while the model is known to be full for this caller's requests of this length."""
        now = asyncio.get_running_loop().time()
        refusal = self._refusals.get(caller)
        if refusal and now < refusal.full_until and refusal.ms <= ms < math.inf:
            raise refusal.repeat(now, ms=ms)

    def record(self, caller: tuple[str, str, str], error: OverloadedError, *, ms: float) -> OverloadedError:
        """Record `error`, with which a replica refused a request. Return the error to raise for the caller.

        The returned error's retry time is later than the retry times of all earlier refusals of this caller.
        """
        if not error.full_for_s:
            return error
        now = asyncio.get_running_loop().time()
        retry_at = now + (error.retry_after_s or 0.0)
        if before := self._refusals.get(caller):
            retry_at = max(retry_at, min(before.retry_at + error.work_s, now + _MOST_RETRY_S))
        if len(self._refusals) >= _MAX_REFUSALS:
            self._refusals = {name: each for name, each in self._refusals.items() if now < each.retry_at}
        if len(self._refusals) < _MAX_REFUSALS or caller in self._refusals:
            self._refusals[caller] = _Refusal(error, ms, now + min(error.full_for_s, _MAX_REPEAT_S), retry_at)
        return OverloadedError(error.message, retry_after_s=retry_at - now)


class RayBackend:
    """Runs each generation request on a replica of the model's deployment."""

    def __init__(
        self,
        catalog: ModelCatalog,
        handles: Mapping[str, DeploymentHandle],
        *,
        application: str,
        metrics: Metrics = NullMetrics(),
    ) -> None:
        self._catalog = catalog
        self._handles = handles
        self._refusals = _Refusals()
        self._watch = ModelWatch((card.name for card in catalog), handles, application=application, metrics=metrics)

    @property
    def catalog(self) -> ModelCatalog:
        return self._catalog

    async def generate(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
    ) -> GenerationResult:
        """Run one request on any replica of the model, see `Backend.generate`.

        If the request is refused, a random time is added to the retry time, so that clients do not all retry at once.
        """
        caller = request.client, model, request.priority
        prices = last_prices(model)
        ms = prices.of_request(request) if prices else math.inf
        try:
            self._refusals.check(caller, ms=ms)
            return await self._run(model, request, on_progress=on_progress)
        except OverloadedError as error:
            refusal = self._refusals.record(caller, error, ms=ms)
            wait_s = (refusal.retry_after_s or _RETRY_AFTER_S) * random.uniform(1.0, 1.0 + _JITTER)
            raise OverloadedError(error.message, retry_after_s=wait_s) from error

    async def _run(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None
    ) -> GenerationResult:
        """Run one request, and retry it once if its replica dies."""
        loop = asyncio.get_running_loop()
        deadline_at = None if request.deadline_s is None else loop.time() + request.deadline_s
        for attempts_left in reversed(range(_ATTEMPTS)):
            remaining_s = None if deadline_at is None else deadline_at - loop.time()
            try:
                return await self._attempt(model, replace(request, deadline_s=remaining_s), on_progress=on_progress)
            except RayError as error:  # the replica died, or the node that held the result
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
        """Call a replica once. Raises RayError if the replica or the result is lost.

        Raises StableAudioError if the request fails for another reason.
        """
        if request.deadline_s is not None and request.deadline_s <= 0:
            raise DeadlineExceededError("the time budget of this request ran out")
        bound_s = None if request.deadline_s is None else request.deadline_s + _DEADLINE_GRACE_S
        handle = self._handles[model]
        response = (
            handle.generate.remote(request)
            if on_progress is None
            else handle.options(stream=True).generate_reporting.remote(request)
        )
        watcher = asyncio.create_task(self._cancel_if_unloadable(model, response))
        try:
            async with asyncio.timeout(bound_s):
                result = await _receive(response, on_progress)
        except TimeoutError as error:
            response.cancel()  # otherwise the replica would continue
            raise DeadlineExceededError("the time budget of this request ran out") from error
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError as error:
            raise OverloadedError("too many requests are waiting", retry_after_s=_RETRY_AFTER_S) from error
        except (DeploymentUnavailableError, RequestCancelledError) as error:
            raise self._unloadable(model) from error
        except RayTaskError as error:  # an unexpected error in the replica; clients must not see its text
            logger.error("a replica failed: %s", error)
            raise GenerationError("the generation failed") from error
        finally:
            watcher.cancel()
        self._watch.note_answer(model)
        if isinstance(result, StableAudioError):
            raise result
        return result

    async def _cancel_if_unloadable(
        self, model: str, response: DeploymentResponse | DeploymentResponseGenerator
    ) -> None:
        """Check every second whether the model has failed to load. If it has, cancel the call and return.

        Ray Serve would let the call wait forever. If the model was ready after the beginning of the call, a replica has
        probably got the call, and completes it even if an update stops this replica and fails. Such a call is not
        cancelled while any replica is stopping; a replica that has died is not. A status from before the call is
        ignored: if the model had failed, Ray Serve may have started it since then.
        """
        began_at = time.monotonic()
        was_ready = False
        while True:
            await asyncio.sleep(_LOAD_CHECK_S)
            status = (await self.status())[model]
            if self.status_age_s > time.monotonic() - began_at:
                continue
            was_ready |= status.stage == "ready"
            if status.stage == "failed" and not (was_ready and status.states.get("stopping")):
                response.cancel()
                return

    def _unloadable(self, model: str) -> ModelUnavailableError:
        """Return the error for a model that failed to load.

        While Ray Serve starts further replicas, because the model was ready before, the error has a retry time.
        Otherwise it has none, because most causes need an operator. Ray Serve starts such a deployment again when its
        options change, or if it has no minimum of replicas, after no request has come for `downscale_delay_s`.
        """
        if self._watch.last(model).states.get("starting"):
            message = f"model {model} lost its replicas and failed to load again; the server's log says why"
            return ModelRestartingError(message, retry_after_s=_RESTART_RETRY_S)
        return ModelUnavailableError(f"model {model} failed to load; the server's log says why")

    async def status(self) -> Mapping[str, ModelStatus]:
        """See `ModelWatch.status`."""
        return await self._watch.status()

    @property
    def status_age_s(self) -> float:
        """See `ModelWatch.age_s`."""
        return self._watch.age_s


async def _receive(
    response: DeploymentResponse | DeploymentResponseGenerator, on_progress: ProgressCallback | None
) -> GenerationResult | StableAudioError:
    """Wait for the result of a call and return it. Each progress report is passed to `on_progress`, if it is given."""
    if on_progress is None:
        return await response
    async for item in response:
        if not isinstance(item, Progress):
            return item
        on_progress(item)
    raise ModelUnavailableError("the replica stopped in the middle of this request", retry_after_s=_RETRY_AFTER_S)
