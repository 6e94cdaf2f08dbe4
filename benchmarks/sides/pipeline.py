"""The pipeline from beginning to end without a scheduler: text, source, every step, decode, for rows that take the same
steps. It runs the engine's own stages, so that only the order of the work differs between the sides.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import get_args

import torch

from stable_audio_serve.core.clock import SystemClock
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, Priority
from stable_audio_serve.core.metrics import NullMetrics
from stable_audio_serve.engine import EngineOptions
from stable_audio_serve.engine.batching import BatchPolicy
from stable_audio_serve.engine.cost import CostModel
from stable_audio_serve.engine.device import open_device
from stable_audio_serve.engine.executor import Executor
from stable_audio_serve.engine.pace import WindowPace
from stable_audio_serve.engine.policies import resolve_mode
from stable_audio_serve.engine.prompt_cache import PromptCache
from stable_audio_serve.engine.request_state import Reply, RequestState
from stable_audio_serve.engine.rows import Decoding, Row, row_work
from stable_audio_serve.engine.scheduler import RowId
from stable_audio_serve.engine.stages import Failures, Stages
from stable_audio_serve.engine.threads import plain_threads, steady_threads
from stable_audio_serve.engine.work import Phase
from stable_audio_serve.models.protocol import DiffusionModel, RowPlan
from stable_audio_serve.sampling.noise import SeededNoise

_ALL_WINDOWS = 2**30  # nothing waits between two of them


class Pipeline:
    """One model on one thread. `await run(requests)` makes all of them together; one call at a time."""

    def __init__(self, model: DiffusionModel, options: EngineOptions, *, policy: BatchPolicy, together: int) -> None:
        """`policy` splits a step into device calls; up to `together` windows or prompts of equal shape share one."""
        self._model = model
        self._threads = options.torch_threads
        device = open_device(model.device, clock=SystemClock())
        self._is_steady = resolve_mode(options, device) == "strict" and not device.shares_calls
        drawer = ThreadPoolExecutor(1, thread_name_prefix="noise")
        executor = Executor(model, policy, device=device, together=together)
        cost = CostModel()
        self._stages = Stages(
            model,
            executor,
            device=device,
            cost=cost,
            cache=PromptCache(options.prompt_cache_bytes),
            drawers=dict.fromkeys(get_args(Priority), drawer),
            pace=WindowPace(cost, turn_frames=_ALL_WINDOWS, is_fixed=self._is_steady),
            clock=SystemClock(),
            metrics=NullMetrics(),
        )
        self._ids = count()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pipeline")

    async def run(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Returns the results in order. Rows must take the same number of evaluations. Raises what the model raises."""
        submitted_at = time.monotonic()
        loop = asyncio.get_running_loop()
        plans = await loop.run_in_executor(self._thread, self._plan, requests)
        states = [
            RequestState(
                next(self._ids),
                request,
                plans=[(plan, row_work(plan, hop=self._model.spec.hop)) for plan in own],
                reply=Reply(None),
                noise_factory=SeededNoise,
                submitted_at=submitted_at,
            )
            for request, own in zip(requests, plans, strict=True)
        ]
        return await loop.run_in_executor(self._thread, self._run, states)

    def close(self) -> None:
        """Wait for the call in progress."""
        self._thread.shutdown()

    def _plan(self, requests: Sequence[GenerationRequest]) -> list[tuple[RowPlan, ...]]:
        return [self._model.plan(request) for request in requests]

    def _run(self, states: Sequence[RequestState]) -> list[GenerationResult]:
        sharing = (steady_threads if self._is_steady else plain_threads)(self._threads)
        with torch.inference_mode(), sharing:
            rows = [self._open(state, index) for state in states for index in range(len(state.plans))]
            started_at = time.monotonic()
            for state in states:
                state.clock.mark("queue", started_at)
            _check(self._stages.start(rows))
            self._run_phase(Phase.ENCODE, rows, run=self._stages.encode)
            _check(self._stages.begin(rows))
            self._run_phase(Phase.DENOISE, rows, run=self._stages.denoise)
            self._run_phase(Phase.DECODE, rows, run=self._stages.decode)
            for row in rows:
                self._stages.deliver(row)
            for _ in rows:
                _check(self._stages.delivered(wait=True)[1])
            return [self._result(state, rows) for state in states]

    def _run_phase(self, phase: Phase, rows: Sequence[Row], *, run: Callable[[Sequence[Row]], Failures]) -> None:
        while working := [row for row in rows if row.work.phase is phase]:
            _check(run(working))
            self._stages.keep_pace()

    def _open(self, state: RequestState, index: int) -> Row:
        plan, work = state.plans[index]
        row = Row(RowId(next(self._ids)), state, index=index, plan=plan, work=work)
        state.rows.append(row)
        return row

    def _result(self, state: RequestState, rows: Sequence[Row]) -> GenerationResult:
        audio = [row.in_phase(Decoding).audio.audio() for row in rows if row.request is state]
        for row in rows:
            if row.request is state:
                row.release()
        card = self._model.spec.card
        return GenerationResult(
            audio=tuple(audio),
            sample_rate_hz=card.sample_rate_hz,
            model=card.name,
            seeds=tuple(plan.seed for plan, _ in state.plans),
            timings=state.clock.timings(),
        )


def _check(failures: Failures) -> None:
    for _, error in failures:
        raise error
