"""The engine's public class: asyncio methods around one engine thread. Accepts, plans and bounds requests; starts and
stops the engine thread. Knows neither Ray nor HTTP.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from typing import get_args

import torch

from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.errors import ConfigError, ModelUnavailableError, OverloadedError
from stable_audio_serve.core.generation import (
    GenerationRequest,
    GenerationResult,
    Priority,
    ProgressCallback,
)
from stable_audio_serve.core.metrics import Metrics, NullMetrics
from stable_audio_serve.core.pricing import Prices
from stable_audio_serve.engine.admission import Admission
from stable_audio_serve.engine.batching import BatchPolicy, OneRowPerCall
from stable_audio_serve.engine.call_shapes import PackedShapes
from stable_audio_serve.engine.cost import CostModel
from stable_audio_serve.engine.device import Device, open_device
from stable_audio_serve.engine.executor import Executor
from stable_audio_serve.engine.inbox import UNAVAILABLE, Inbox
from stable_audio_serve.engine.loop import EngineLoop
from stable_audio_serve.engine.memory import RowMemory
from stable_audio_serve.engine.options import EngineOptions
from stable_audio_serve.engine.pace import WindowPace
from stable_audio_serve.engine.planner import Planner
from stable_audio_serve.engine.policies import resolve_mode, resolve_policy
from stable_audio_serve.engine.prediction import Predictor
from stable_audio_serve.engine.price_list import PriceList
from stable_audio_serve.engine.prompt_cache import PromptCache
from stable_audio_serve.engine.request_state import Reply, RequestState, late
from stable_audio_serve.engine.rows import row_work
from stable_audio_serve.engine.scheduler import Scheduler, SchedulerLimits
from stable_audio_serve.engine.share import plan_memory
from stable_audio_serve.engine.stages import Stages
from stable_audio_serve.engine.thread import EngineHeartbeat, EngineThread
from stable_audio_serve.engine.threads import plain_threads, steady_threads
from stable_audio_serve.engine.warmup import WarmUp
from stable_audio_serve.models.protocol import DiffusionModel, ModelSpec
from stable_audio_serve.sampling.noise import NoiseSource, SeededNoise

_STOP_TIMEOUT_S = 30.0  # closing does not wait for a longer step
_EXIT_TIMEOUT_S = 2.0


class Engine:
    """Generates audio with one model; rows of all requests share the device step by step.

    `await Engine(model).generate(request)` starts the engine when needed; `async with Engine(model) as engine` also
    waits for the warm-up and closes at the end. Methods may be called from several event loops. Runs in one process,
    with one thread that uses the device.
    """

    def __init__(
        self,
        model: DiffusionModel,
        options: EngineOptions = EngineOptions(),
        *,
        clock: Clock = SystemClock(),
        metrics: Metrics = NullMetrics(),
        noise_factory: Callable[[int], NoiseSource] = SeededNoise,
        policy: BatchPolicy | None = None,
        scheduler: Callable[..., Scheduler] = Scheduler,
        device: Device | None = None,
    ) -> None:
        """`noise_factory` makes a row's noise from its seed; `policy` None: the one for these options and device.

        `scheduler` is called like the class `Scheduler`. `device` None: the model's.
        """
        self._model = model
        self._device = device or open_device(model.device, clock=clock)
        self._clock = clock
        self._metrics = metrics
        self._noise_factory = noise_factory
        self._make_scheduler = scheduler
        self.mode = resolve_mode(options, self._device)
        if self.mode == "strict" and model.spec.is_compiled:
            message = "compile cannot be used in strict mode, in which a row's bytes must not depend on a call's shape"
            raise ConfigError(message, field="compile", allowed="mode: fast")
        self.memory = plan_memory(
            self._device.memory(),
            max_rows_bytes=options.max_memory_bytes,
            prompt_cache_bytes=options.prompt_cache_bytes,
        )
        self._admission = Admission(options.max_queue_s, batch_share=options.batch_share, clock=clock)
        self._inbox = Inbox()
        self._drawers = {priority: ThreadPoolExecutor(1, thread_name_prefix="noise") for priority in get_args(Priority)}
        self._planners: dict[Priority, Planner] = {
            priority: Planner(
                model, num_threads=options.planning_threads, max_pending=options.max_planning, clock=clock
            )
            for priority in get_args(Priority)
        }
        cost = CostModel()
        policy = policy or resolve_policy(
            options,
            self._device,
            cost=cost,
            pads_rows=model.spec.pads_rows,
            packs_rows=model.spec.packs_rows,
            packed=PackedShapes(model.spec.num_prefix, model.spec.max_frames) if model.spec.packs_segments else None,
        )
        self._pace = WindowPace(cost, turn_frames=options.turn_frames, is_fixed=self.mode == "strict")
        self._predictor = Predictor(cost, policy, turn_frames=self._pace.turn_frames)
        self._price_list = PriceList(model, self._predictor)
        self._thread = self._build_thread(options, policy=policy, cost=cost)
        self._start_lock = threading.Lock()
        self._is_started = False
        self._is_closing = False
        self._num_in_flight = 0
        self._request_ids = count()
        weakref.finalize(self, self._thread.stop, timeout_s=_EXIT_TIMEOUT_S)

    async def start(self) -> None:
        """Start the engine thread and wait for its warm-up.

        Raises ModelUnavailableError if the model fails in it, or if the engine was closed, and ConfigError where its
        memory holds no request.
        """
        self._ensure_started()
        if self._is_closing:
            raise ModelUnavailableError(UNAVAILABLE)
        await asyncio.to_thread(self._thread.wait_ready)
        if isinstance(self._thread.error, ConfigError):
            raise self._thread.error
        if self._thread.error is not None:
            raise ModelUnavailableError("the model failed during warm-up") from self._thread.error

    async def close(self, *, drain_s: float = 0.0) -> None:
        """Stop accepting, wait up to `drain_s` for accepted work, then fail the rest as unavailable."""
        self._is_closing = True
        ends_at = self._clock.monotonic() + drain_s
        while self._num_in_flight and self._clock.monotonic() < ends_at:  # noqa: ASYNC110 - callers on several loops
            await asyncio.sleep(0.01)
        if self._is_started:
            await asyncio.to_thread(self._thread.stop, timeout_s=_STOP_TIMEOUT_S)
        for planner in self._planners.values():
            planner.close()
        for drawer in self._drawers.values():
            drawer.shutdown(wait=False, cancel_futures=True)

    async def __aenter__(self) -> Engine:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def generate(
        self,
        request: GenerationRequest,
        on_progress: ProgressCallback | None = None,
        *,
        frames: int | None = None,
    ) -> GenerationResult:
        """Returns the audio of one request, variations in order of their seeds.

        `on_progress` is called on this event loop. `frames` sets the latent length (for a row of a reference batch).
        Cancelling the awaiting task ends the rows at the next step boundary. Raises InvalidRequestError,
        OverloadedError, DeadlineExceededError, GenerationError, ModelUnavailableError.
        """
        self._ensure_started()
        if self._is_closing:
            raise ModelUnavailableError(UNAVAILABLE)
        self._num_in_flight += 1
        try:
            state = await self._accept(request, on_progress, frames=frames)
            try:
                return replace(await state.reply.future, device=replace(self._device.use(), dtype=self.dtype))
            except asyncio.CancelledError:
                state.cancel()
                self._inbox.wake()
                raise
        except OverloadedError:
            self._metrics.increment("engine_requests", outcome="refused")
            raise
        finally:
            self._num_in_flight -= 1

    @property
    def spec(self) -> ModelSpec:
        return self._model.spec

    @property
    def device(self) -> torch.device:
        """The device that holds the model."""
        return self._model.device

    @property
    def dtype(self) -> str:
        """Precision of the denoiser: float32, float16 or bfloat16."""
        return str(self.spec.dtype).removeprefix("torch.")

    @property
    def backlog_ms(self) -> float:
        """Predicted device time of everything accepted and unfinished."""
        return self._admission.backlog_ms

    def prices(self) -> Prices:
        """Returns what work costs on this engine now, for those who have a request but no engine."""
        return self._price_list.current()

    @property
    def accepted_ms(self) -> float:
        """Predicted device time of everything ever accepted."""
        return self._admission.accepted_ms

    def heartbeat(self) -> EngineHeartbeat:
        """Returns whether the engine thread is alive and how old its last turn is."""
        return self._thread.heartbeat()

    def check_health(self, *, max_silence_s: float = 300.0) -> None:
        """Raises ModelUnavailableError if a started engine's thread ended or has not turned for `max_silence_s`."""
        beat = self.heartbeat()
        if self._is_started and (not beat.is_alive or beat.age_s > max_silence_s):
            raise ModelUnavailableError(UNAVAILABLE)

    async def _accept(
        self, request: GenerationRequest, on_progress: ProgressCallback | None, *, frames: int | None
    ) -> RequestState:
        """Plan a request, admit it and pass it to the engine thread."""
        submitted_at = self._clock.monotonic()
        priority = request.priority
        self._admission.check(priority, is_promised=request.is_promised)
        try:
            async with asyncio.timeout(request.deadline_s):
                plans = await self._planners[priority].plan(request, frames=frames)
        except TimeoutError:
            self._metrics.increment("engine_requests", outcome="expired")
            raise late(request) from None
        works = [row_work(plan, hop=self.spec.hop) for plan in plans]
        state = RequestState(
            next(self._request_ids),
            request,
            plans=tuple(zip(plans, works, strict=True)),
            reply=Reply(on_progress),
            noise_factory=self._noise_factory,
            submitted_at=submitted_at,
        )
        if any(work.encode_left for work in works):
            state.clock.mark("source", self._clock.monotonic())  # most of its planning was resampling
        within_s = None
        if request.in_time and request.deadline_s is not None:
            within_s = request.deadline_s - (self._clock.monotonic() - submitted_at)
        work_ms = sum(map(self._predictor.share_ms, works))
        self._admission.admit(state.id, work_ms, priority=priority, is_promised=request.is_promised, within_s=within_s)
        try:
            self._inbox.put(state)
        except ModelUnavailableError:
            self._admission.release(state.id)
            raise
        return state

    def _ensure_started(self) -> None:
        with self._start_lock:
            if not self._is_started and not self._is_closing:
                self._is_started = True
                self._thread.start()

    def _build_thread(self, options: EngineOptions, *, policy: BatchPolicy, cost: CostModel) -> EngineThread:
        together = 1 if self.mode == "strict" else options.slots
        executor = Executor(
            self._model,
            policy,
            device=self._device,
            together=together,
            clock=self._clock,
            metrics=self._metrics,
            max_capture_bytes=self.memory.captures,
        )
        limits = SchedulerLimits(
            max_started=options.max_rows,
            max_tokens=0 if isinstance(policy, OneRowPerCall) else options.max_step_tokens,
            slack=options.slack,
            max_slack_s=options.max_slack_s,
            batch_share=options.batch_share,
            max_bytes=self.memory.rows,
        )
        memory = RowMemory(
            self._model.spec,
            max_bytes=self.memory.rows,
            is_fixed=self._pace.is_fixed,
            setting=self.memory.setting,
        )
        stages = Stages(
            self._model,
            executor,
            device=self._device,
            cost=cost,
            cache=PromptCache(options.prompt_cache_bytes),
            drawers=self._drawers,
            pace=self._pace,
            clock=self._clock,
            metrics=self._metrics,
        )
        loop = EngineLoop(
            self._model.spec,
            scheduler=self._make_scheduler(
                limits,
                knee_tokens=lambda frames: frames * policy.crowd(1, frames),
                step_ms=self._predictor.step_ms,
                has_second_queue=self._device.has_second_queue,
            ),
            stages=stages,
            predictor=self._predictor,
            memory=memory,
            admission=self._admission,
            inbox=self._inbox,
            clock=self._clock,
            metrics=self._metrics,
        )
        warm_up = WarmUp(
            self._model,
            cost,
            policy=policy,
            max_tokens=limits.max_tokens,
            max_prompts=together,
            noise_factory=self._noise_factory,
            device=self._device,
            budget_s=options.warmup_budget_s,
        )
        is_steady = self.mode == "strict" and not self._device.shares_calls
        sharing = (steady_threads if is_steady else plain_threads)(options.torch_threads)

        model, noise_factory = self._model, self._noise_factory

        def prepare() -> None:  # which must not hold this engine: a forgotten one ends its thread
            memory.measure(model, noise_factory)
            if options.warmup_budget_s > 0:
                warm_up.run()

        return EngineThread(loop, self._inbox, sharing=sharing, prepare=prepare, clock=self._clock)
