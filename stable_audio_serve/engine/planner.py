"""Plans requests: computes lengths and noise schedules, and resamples source audio. Planning runs on worker threads, so
that neither the event loop nor the engine thread waits for it. Usable from several event loops.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch

from stable_audio_serve.core.errors import GenerationError, OverloadedError, StableAudioError, engine_stopped
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.models.protocol import DiffusionModel, RowPlan

log = logging.getLogger(__name__)

_FULL_RETRY_S = 2.0


class Planner:
    """Plans requests on two threads: one for requests with source audio, because resampling takes up to a second, and
    one for all others. At most `max_pending` requests may wait for planning or be planned.
    """

    def __init__(self, model: DiffusionModel, *, max_pending: int) -> None:
        self._model = model
        self._max_pending = max_pending
        # A planning thread uses one torch thread, so that resampled audio does not depend on the number of cores.
        one_thread = partial(torch.set_num_threads, 1)
        self._pools = {
            has_source: ThreadPoolExecutor(1, thread_name_prefix="planning", initializer=one_thread)
            for has_source in (False, True)
        }
        self._lock = threading.Lock()
        self._num_pending = 0
        self._closed = False

    async def plan(self, request: GenerationRequest, *, frames: int | None) -> tuple[RowPlan, ...]:
        """Return the model's plans for a request, one per variation. `frames` overrides the latent length.

        Raises OverloadedError if there are already `max_pending` requests, and ModelUnavailableError if the planner is
        closed. A StableAudioError from the model is raised as it is, any other exception as GenerationError.
        """
        with self._lock:
            if self._closed:
                raise engine_stopped()
            if self._num_pending >= self._max_pending:
                message = "too many requests are being prepared; retry later"
                raise OverloadedError(message, retry_after_s=_FULL_RETRY_S)
            self._num_pending += 1
            has_source = request.init_audio is not None or request.inpaint_audio is not None
            future = self._pools[has_source].submit(self._run, request, frames)
        future.add_done_callback(self._forget)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Accept no more requests. Waiting requests fail with ModelUnavailableError. Requests that are being planned
        are still finished.
        """
        with self._lock:
            self._closed = True
        for pool in self._pools.values():
            pool.shutdown(wait=False)

    def _run(self, request: GenerationRequest, frames: int | None) -> tuple[RowPlan, ...]:
        if self._closed:
            raise engine_stopped()
        try:
            return self._model.plan(request, frames=frames)
        except StableAudioError:
            raise
        except Exception as error:
            log.exception("planning request %s failed", request.request_id)
            raise GenerationError("the model failed on this request") from error

    def _forget(self, _: Future[tuple[RowPlan, ...]]) -> None:
        with self._lock:
            self._num_pending -= 1
