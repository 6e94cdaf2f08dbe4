"""The public class `Engine`: asyncio methods around one engine thread, which does all device work. `Engine` plans
requests, refuses them if too much work is waiting, and starts and stops the thread. `engine.build` creates everything
that runs on the thread. Does not use Ray or HTTP.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import get_args

import torch

from stable_audio_serve.audio.keep import keep_source, plan_spans
from stable_audio_serve.audio.seams import close_loop, loop_samples, with_surplus
from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.errors import ConfigError, ModelUnavailableError, OverloadedError, engine_stopped
from stable_audio_serve.core.generation import (
    GenerationRequest,
    GenerationResult,
    Loaded,
    LoopStart,
    Mode,
    Priority,
    ProgressCallback,
)
from stable_audio_serve.core.metrics import Metrics, NullMetrics
from stable_audio_serve.core.pricing import Prices
from stable_audio_serve.engine.adapters import Adapters
from stable_audio_serve.engine.admission import Admission
from stable_audio_serve.engine.build import build_parts, resolve_mode
from stable_audio_serve.engine.calls.requests import Reply, RequestState, deadline_error
from stable_audio_serve.engine.hardware.device import Device, open_device
from stable_audio_serve.engine.hardware.share import MemoryPlan
from stable_audio_serve.engine.options import PLAIN, EngineOptions, Features
from stable_audio_serve.engine.planner import Planner
from stable_audio_serve.engine.profile import Profile, prove
from stable_audio_serve.engine.provenance import complete_provenance, describe_engine, require_checkpoint
from stable_audio_serve.engine.scheduling.batching import BatchPolicy
from stable_audio_serve.engine.scheduling.prediction import PriceList
from stable_audio_serve.engine.scheduling.scheduler import RowWork
from stable_audio_serve.models.protocol import DiffusionModel, ModelSpec, RowPlan, SwitchableModel
from stable_audio_serve.sampling.noise import NoiseSource, SeededNoise

_STOP_TIMEOUT_S = 30.0  # how long `close` waits at most for the thread to end after its current step
_EXIT_TIMEOUT_S = 2.0
_MAX_SILENCE_S = 300.0


class Engine:
    """Generates audio with one model. Clips of different requests share denoising steps.

    `await Engine(model).generate(request)` starts the engine thread if needed. `async with Engine(model) as engine`
    also waits for the warm-up, and closes the engine at the end. Methods may be called from several event loops. All
    device work runs on one thread of this process.
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
        device: Device | None = None,
        loaded: Loaded = Loaded(),
        fetch_adapter: Callable[[str], Path] = Path,
    ) -> None:
        """`noise_factory` makes a clip's noise source from its seed. If `policy` is None, a batch policy is chosen for
        the options and the device. If `device` is None, it is the model's device. `loaded` becomes part of the
        provenance of each result. `fetch_adapter` returns the file of an adapter's source, and downloads it if
        necessary.
        """
        self._model = model
        self._options = options
        self._whole_device = device or open_device(model.device, clock=clock)
        self._clock = clock
        self._metrics = metrics
        self._noise_factory = noise_factory
        self._policy = policy
        self.mode = resolve_mode(options, self._whole_device)
        if self.mode == "strict" and model.spec.is_compiled:
            message = "compile cannot be used in strict mode, in which a row's bytes must not depend on a call's shape"
            raise ConfigError(message, field="compile", allowed="mode: fast")
        self._loaded = loaded
        self._fetch_adapter = fetch_adapter
        self._adapters = Adapters(
            model,
            max_bytes=options.lora_cache_bytes // (2 if self._whole_device.can_capture else 1),
            max_rank=options.max_lora_rank,
            fetch=fetch_adapter,
            clock=clock,
            metrics=metrics,
        )
        self._admission = Admission(options.max_queue_s, batch_share=options.batch_share, clock=clock)
        self._assemble(_configured_profile(options, self._whole_device))
        self._planners: dict[Priority, Planner] = {
            priority: Planner(model, max_pending=options.max_planning) for priority in get_args(Priority)
        }
        self._start_lock = threading.Lock()
        self._is_started = False
        self._is_proved = False
        self._is_closing = False
        self._request_ids = count()
        self._proving = asyncio.Lock()

    def _assemble(self, profile: Profile) -> None:
        """Build everything that runs on the engine thread. Must not be called once the thread has started."""
        self.profile = profile
        self._device = self._whole_device.restricted(profile.features)
        if self._decodes_exactly:
            self._loaded = replace(self._loaded, decode_precision="float32")
        self._provenance = describe_engine(
            self._model.spec,
            self._options,
            device=self._model.device,
            mode=self.mode,
            loaded=self._loaded,
            profile=profile,
        )
        parts = build_parts(
            self._model,
            self._options,
            device=self._device,
            features=profile.features,
            mode=self.mode,
            admission=self._admission,
            noise_factory=self._noise_factory,
            policy=self._policy,
            clock=self._clock,
            metrics=self._metrics,
        )
        self._memory = parts.memory
        self._stages = parts.stages
        self._thread = parts.thread
        self._inbox = parts.inbox
        self._predictor = parts.predictor
        self._noise_pools = parts.noise_pools
        self._price_list = PriceList(self._model, self._predictor)
        weakref.finalize(self, self._thread.stop, timeout_s=_EXIT_TIMEOUT_S)

    @property
    def _decodes_exactly(self) -> bool:
        """Whether the profile makes the decoder use float32 instead of the configured `decode_precision`."""
        return not self.profile.features.fast_decoding and not self._whole_device.is_proved

    async def _prove(self) -> None:
        """Check once, before the engine thread starts, that the profile's features give the right audio. If not, switch
        to the plain profile. The check runs on temporary engines with the same model.
        """
        async with self._proving:
            if self._is_started or self._is_proved:
                return
            if self._options.profile == "auto" and not self._whole_device.is_proved and self.profile.features != PLAIN:
                profile = await prove(self._sibling, self.profile.features, spec=self.spec, mode=self.mode)
                if profile != self.profile:
                    self._assemble(profile)
            if isinstance(self._model, SwitchableModel):
                fused = self.profile.features.fused_kernels
                use_features = self._model.use_features  # takes seconds if Triton has to compile kernels
                await asyncio.to_thread(use_features, fast_decoding=not self._decodes_exactly, fused_kernels=fused)
            self._metrics.gauge("engine_profile", 1.0, profile=self.profile.name)
            self._is_proved = True

    def _sibling(self, features: Features, mode: Mode) -> Engine:
        """Return an engine with the same model for the check of the profile. Its own profile is not checked."""
        options = replace(
            self._options, mode=mode, profile="accelerated", features=features, warmup_budget_s=0.0, max_queue_s=1e6
        )
        return Engine(
            self._model,
            options,
            clock=self._clock,
            device=self._whole_device,
            loaded=self._loaded,
            fetch_adapter=self._fetch_adapter,
        )

    async def start(self) -> None:
        """Start the engine thread and wait for its warm-up.

        Raises ModelUnavailableError if the warm-up fails or the engine is closed, and ConfigError if the device memory
        left to the engine is too small for even the shortest request.
        """
        await self._prove()
        self._ensure_started()
        if self._is_closing:
            raise engine_stopped()
        await asyncio.to_thread(self._thread.wait_ready)
        if isinstance(self._thread.error, ConfigError):
            raise self._thread.error
        if self._thread.error is not None:
            raise ModelUnavailableError("the model failed during warm-up") from self._thread.error

    async def close(self) -> None:
        """Accept no more requests, and stop the engine. Unfinished requests fail with ModelUnavailableError."""
        self._is_closing = True
        if self._is_started:
            await asyncio.to_thread(self._thread.stop, timeout_s=_STOP_TIMEOUT_S)
        for planner in self._planners.values():
            planner.close()
        self._adapters.close()
        for noise_pool in self._noise_pools.values():
            noise_pool.shutdown(wait=False, cancel_futures=True)

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
        """Generate the audio of one request. The variations are in order of their seeds.

        `on_progress` is called on this event loop. `frames` overrides the latent length; with it, a clip from a
        reference batch that was padded to this length can be reproduced. If the awaiting task is cancelled, the engine
        stops the work after the current step. Raises InvalidRequestError, OverloadedError, DeadlineExceededError,
        GenerationError, or ModelUnavailableError.
        """
        if not self._is_proved:
            await self._prove()
        self._ensure_started()
        if self._is_closing:
            raise engine_stopped()
        require_checkpoint(request, spec=self.spec, loaded=self._provenance.loaded)
        try:
            max_s = self.spec.card.max_duration_s
            planned = with_surplus(request, max_duration_s=max_s) if request.loop else request
            state = await self._accept(planned, on_progress, frames=frames)
            try:
                result = await state.reply.future
                prompts = state.shared.prompts.values()
                provenance = complete_provenance(self._provenance, request, spec=self.spec, prompts=prompts)
                result = replace(result, device=replace(self._device.use(), dtype=self.dtype), provenance=provenance)
                if request.loop is not None:
                    return await asyncio.to_thread(_close_loops, result, request, loop=request.loop)
                if request.inpaint_audio is None:
                    return result
                return await asyncio.to_thread(_keep_source, result, request, plan=state.plans[0][0])
            except asyncio.CancelledError:
                state.cancel()
                self._inbox.wake()
                raise
        except OverloadedError:
            self._metrics.increment("engine_requests", outcome="refused")
            raise

    @property
    def spec(self) -> ModelSpec:
        return self._model.spec

    def describe_profile(self) -> str:
        """Describe the profile in one line: its name, the reason if it is plain, and each of its features that could
        not be used, with the reason.
        """
        own = [str(self.profile)]
        if self.profile.features.packing and self.mode == "fast" and not self.spec.packs_segments:
            own.append("packing off: this torch or precision has no attention for packed rows")
        if self.profile.features.fused_kernels and not self.spec.has_fused_kernels:
            own.append("fused_kernels off: Triton's kernels do not work here, or the model is compiled")
        if reason := self._stages.executor.graphs.off_reason:
            own.append(f"captures off: {reason}")
        return "; ".join(own)

    @property
    def memory(self) -> MemoryPlan:
        """How the device's memory is divided. Complete once the engine has started."""
        return self._memory.plan

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def dtype(self) -> str:
        """The dtype of the denoiser's weights: float32, float16 or bfloat16."""
        return str(self.spec.dtype).removeprefix("torch.")

    def name_checkpoint(self, checkpoint: str) -> None:
        """Record `checkpoint`, the hash of the loaded weights. From then on, requests for another hash are refused."""
        self._loaded = replace(self._loaded, checkpoint=checkpoint)
        self._provenance = replace(self._provenance, loaded=self._loaded)

    @property
    def backlog_ms(self) -> float:
        """The predicted device time of all accepted, unfinished requests, in milliseconds."""
        return self._admission.backlog_ms

    def prices(self) -> Prices:
        """Return the coefficients from which processes without this engine predict how long a request takes."""
        return self._price_list.current()

    def adapters_in_memory(self) -> list[str]:
        """Return the hashes of the adapter files that are loaded."""
        return self._adapters.hashes()

    @property
    def busy_s(self) -> float:
        """For how many seconds the engine has been working since it started."""
        return self._thread.busy_s

    @property
    def is_alive(self) -> bool:
        """Whether the engine thread runs."""
        return self._thread.is_alive

    @property
    def has_crashed(self) -> bool:
        """Whether an error has ended the engine thread, so that every request fails."""
        return self._thread.error is not None

    def check_health(self) -> None:
        """Raise ModelUnavailableError if the engine thread has ended, or if its loop has not begun a turn for
        `_MAX_SILENCE_S` seconds. An engine that was never started passes.
        """
        if self._is_started and (not self.is_alive or self._thread.silence_s > _MAX_SILENCE_S):
            raise engine_stopped()

    async def _accept(
        self, request: GenerationRequest, on_progress: ProgressCallback | None, *, frames: int | None
    ) -> RequestState:
        """Plan a request, check that the queue has room for it, and hand it to the engine thread. Returns its state."""
        submitted_at = self._clock.monotonic()
        priority = request.priority
        self._admission.check(priority, client=request.client)
        try:
            async with asyncio.timeout(request.deadline_s):
                plans = await self._planners[priority].plan(request, frames=frames)
                slots = await self._adapters.acquire(request, plans[0].sampler.evaluations)
        except TimeoutError:
            self._metrics.increment("engine_requests", outcome="expired")
            raise deadline_error(request) from None
        except asyncio.CancelledError:
            self._metrics.increment("engine_requests", outcome="cancelled")
            raise
        works = [RowWork.of(plan, hop=self.spec.hop, is_adapted=bool(slots.by_evaluation)) for plan in plans]
        state = RequestState(
            next(self._request_ids),
            request,
            plans=tuple(zip(plans, works, strict=True)),
            reply=Reply(on_progress),
            noise_factory=self._noise_factory,
            submitted_at=submitted_at,
            slots=slots,
        )
        if any(work.encode_left for work in works):
            # With source audio, the planning time counts as source time, because most of it was resampling.
            state.clock.mark("source", self._clock.monotonic())
        work_ms = sum(map(self._predictor.share_ms, works))
        try:
            self._admission.admit(state.id, work_ms, priority=priority, client=request.client)
            self._inbox.put(state)
        except (OverloadedError, ModelUnavailableError):
            self._admission.release(state.id)
            slots.release()
            raise
        return state

    def _ensure_started(self) -> None:
        with self._start_lock:
            if not self._is_started and not self._is_closing:
                self._is_started = True
                self._thread.start()


def _configured_profile(options: EngineOptions, device: Device) -> Profile:
    if device.is_proved:
        return Profile(PLAIN, f"the device {device.torch_device.type} has no speed features")
    if options.profile == "plain":
        return Profile(PLAIN, "engine.profile is plain")
    return Profile(options.features)


def _close_loops(result: GenerationResult, request: GenerationRequest, *, loop: LoopStart) -> GenerationResult:
    """Return the result with each clip turned into a loop of the requested duration. The clips of `result` are longer
    than the loops.
    """
    rate_hz = result.sample_rate_hz
    num_samples = loop_samples(request.duration_s, rate_hz)
    close = partial(close_loop, num_samples=num_samples, sample_rate_hz=rate_hz, loop=loop)
    return replace(result, audio=tuple(map(close, result.audio)), loop_s=request.duration_s)


def _keep_source(result: GenerationResult, request: GenerationRequest, *, plan: RowPlan) -> GenerationResult:
    """Copy the parts of the source that the request keeps into the audio of `result`, in place.

    Returns `result` with `generated` set to the parts of each clip that are not copied. Returns `result` unchanged if
    the request edits no regions, or if the request's `keep` is "model".
    """
    given, source = request.inpaint_audio, plan.inpaint_source
    if given is None or source is None or request.keep == "model" or not request.inpaint_regions_s:
        return result
    spans = plan_spans(
        request.inpaint_regions_s,
        num_source=given.resampled_length(to_hz=result.sample_rate_hz),
        source_start=int(request.source_start_s * result.sample_rate_hz),
        num_samples=plan.output_samples,
        sample_rate_hz=result.sample_rate_hz,
    )
    samples = source.samples.numpy()
    return replace(result, generated=tuple(keep_source(audio, samples, spans=spans) for audio in result.audio))
