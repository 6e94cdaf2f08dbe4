"""Generation without a scheduler: a batch of requests with the same number of steps runs through all stages at once.

The stages (text, source audio, steps, decoding) are the engine's own, and CUDA graphs are captured when the engine
would capture them. Therefore the compared servers differ only in the order of work.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import get_args

import torch

from stable_audio_serve.core.clock import SystemClock
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, Priority
from stable_audio_serve.core.metrics import NullMetrics
from stable_audio_serve.engine import EngineOptions
from stable_audio_serve.engine.adapters import Adapters
from stable_audio_serve.engine.build import resolve_mode
from stable_audio_serve.engine.calls.executor import Executor
from stable_audio_serve.engine.calls.requests import Decoding, Failures, Reply, RequestState, Row
from stable_audio_serve.engine.calls.stages import Stages
from stable_audio_serve.engine.hardware.device import Device, open_device
from stable_audio_serve.engine.hardware.threads import plain_threads, steady_threads
from stable_audio_serve.engine.scheduling.batching import BatchPolicy
from stable_audio_serve.engine.scheduling.cost import CostModel
from stable_audio_serve.engine.scheduling.scheduler import Phase, RowId, RowWork
from stable_audio_serve.models.protocol import DiffusionModel
from stable_audio_serve.sampling.noise import SeededNoise

_SETTLED_S = 1.0  # an idle engine that has captured no CUDA graph for this time has nothing left to capture


def open_adapters(model: DiffusionModel, options: EngineOptions) -> Adapters:
    """Returns the adapters of an engine with these options. Their sources are paths of files."""
    return Adapters(
        model,
        max_bytes=options.lora_cache_bytes,
        max_rank=options.max_lora_rank,
        fetch=Path,
        clock=SystemClock(),
        metrics=NullMetrics(),
    )


class Captures(NullMetrics):
    """Receives the engine metrics of one compared server, and counts its captured CUDA graphs.

    `changed_at` is the monotonic time of the last capture, or of the last call without a graph, whichever is later.
    """

    def __init__(self) -> None:
        self._captured: Counter[str] = Counter()  # number of graphs for each kind of call
        self.num_misses = 0
        self.num_off = 0  # how often the engine switched captures off
        self.changed_at = float("-inf")

    @property
    def num_captured(self) -> int:
        return self._captured.total()

    def gauge(self, name: str, value: float, **labels: str) -> None:
        if name == "engine_graphs":
            self._captured[labels["kind"]], self.changed_at = int(value), time.monotonic()

    def increment(self, name: str, value: float = 1.0, **labels: str) -> None:
        if name == "engine_graph_misses":
            self.num_misses, self.changed_at = self.num_misses + int(value), time.monotonic()
        self.num_off += name == "engine_captures_off"


async def wait_for_captures(captures: Captures) -> None:
    """Wait until an idle engine has captured all CUDA graphs that it will capture."""
    while time.monotonic() < captures.changed_at + _SETTLED_S:  # noqa: ASYNC110 - another thread captures
        await asyncio.sleep(0.05)


class Pipeline:
    """Generates batches of requests on one thread, without a scheduler.

    `await run(requests)` generates a batch. Batches run one after another, in the order of their calls of `run`.
    """

    def __init__(
        self, model: DiffusionModel, options: EngineOptions, *, policy: Callable[[Device], BatchPolicy], together: int
    ) -> None:
        """`policy` splits a step into device calls. Up to `together` windows or prompts of equal shape share a call."""
        self._model = model
        self._threads = options.torch_threads
        self.captures = Captures()
        device = open_device(model.device, clock=SystemClock())
        self._captures_calls = device.can_capture
        self._is_steady = resolve_mode(options, device) == "strict" and not device.shares_calls
        noise_pool = ThreadPoolExecutor(1, thread_name_prefix="noise")
        executor = Executor(model, policy(device), device=device, max_per_call=together, metrics=self.captures)
        self._stages = Stages(
            model,
            executor,
            device=device,
            cost=CostModel(),
            prompt_cache_bytes=options.prompt_cache_bytes,
            noise_pools=dict.fromkeys(get_args(Priority), noise_pool),
            is_fixed=self._is_steady,
            clock=SystemClock(),
            metrics=self.captures,
        )
        self._adapters = open_adapters(model, options)
        self._ids = count()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pipeline")
        self._turn = asyncio.Lock()
        self._num_asked = 0
        self._settling: asyncio.Task[None] | None = None

    async def run(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Returns the results in the order of `requests`, which must need the same number of denoiser evaluations.

        Raises the errors of the model.
        """
        submitted_at = time.monotonic()
        self._num_asked += 1
        try:
            async with self._turn:
                return await self._run_now(requests, submitted_at)
        finally:
            self._num_asked -= 1
            if self._captures_calls and not self._num_asked:
                self._settling = asyncio.create_task(self.settle())

    async def settle(self) -> None:
        """Capture CUDA graphs of frequent calls until none is left or the next request arrives."""
        loop = asyncio.get_running_loop()
        while not self._num_asked and await loop.run_in_executor(self._thread, self._capture):
            pass

    async def close(self) -> None:
        """Wait for the batch in progress, and stop the thread."""
        if self._settling is not None:
            self._settling.cancel()
        self._adapters.close()
        await asyncio.to_thread(self._thread.shutdown)

    async def _run_now(self, requests: Sequence[GenerationRequest], submitted_at: float) -> list[GenerationResult]:
        loop = asyncio.get_running_loop()
        plans = await loop.run_in_executor(self._thread, lambda: list(map(self._model.plan, requests)))
        states = [
            RequestState(
                next(self._ids),
                request,
                plans=[(plan, RowWork.of(plan, hop=self._model.spec.hop)) for plan in own],
                reply=Reply(None),
                noise_factory=SeededNoise,
                submitted_at=submitted_at,
                slots=await self._adapters.acquire(request, own[0].sampler.evaluations),
            )
            for request, own in zip(requests, plans, strict=True)
        ]
        return await loop.run_in_executor(self._thread, self._run, states)

    def _capture(self) -> bool:
        with torch.inference_mode():
            return self._captures_calls and self._stages.executor.graphs.capture_next(is_idle=True)

    def _run(self, states: Sequence[RequestState]) -> list[GenerationResult]:
        sharing = (steady_threads if self._is_steady else plain_threads)(self._threads or torch.get_num_threads())
        with torch.inference_mode(), sharing:
            rows = [
                Row(RowId(next(self._ids)), state, index=index, plan=plan, work=work)
                for state in states
                for index, (plan, work) in enumerate(state.plans)
            ]
            for row in rows:
                row.request.rows.append(row)
            try:
                self._run_rows(states, rows)
                return [self._result(state, rows) for state in states]
            finally:
                for row in rows:
                    row.release()
                for state in states:
                    state.shared.release()
                    state.slots.release()

    def _run_rows(self, states: Sequence[RequestState], rows: Sequence[Row]) -> None:
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

    def _run_phase(self, phase: Phase, rows: Sequence[Row], *, run: Callable[[Sequence[Row]], Failures]) -> None:
        while working := [row for row in rows if row.work.phase is phase]:
            _check(run(working))
            self._stages.times.keep_pace()
            self._stages.executor.graphs.capture_next(is_idle=False)

    def _result(self, state: RequestState, rows: Sequence[Row]) -> GenerationResult:
        audio = [row.in_phase(Decoding).audio.audio() for row in rows if row.request is state]
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
