"""Puts the engine's machinery together, once: the thread that uses the device, with all that works on it. Knows no
requests and no event loop, and never sees the engine, so that a forgotten one is freed and ends its thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import get_args

from stable_audio_serve.core.clock import Clock
from stable_audio_serve.core.generation import Mode, Priority
from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.engine.admission import Admission
from stable_audio_serve.engine.batching import BatchPolicy, OneRowPerCall
from stable_audio_serve.engine.call_shapes import PackedShapes
from stable_audio_serve.engine.cost import CostModel
from stable_audio_serve.engine.device import Device
from stable_audio_serve.engine.executor import Executor
from stable_audio_serve.engine.inbox import Inbox
from stable_audio_serve.engine.loop import EngineLoop
from stable_audio_serve.engine.memory import RowMemory
from stable_audio_serve.engine.options import EngineOptions
from stable_audio_serve.engine.pacing import WindowPace
from stable_audio_serve.engine.policies import resolve_policy
from stable_audio_serve.engine.prediction import Predictor
from stable_audio_serve.engine.prompt_cache import PromptCache
from stable_audio_serve.engine.scheduler import Scheduler, SchedulerLimits
from stable_audio_serve.engine.share import MemoryPlan, plan_memory
from stable_audio_serve.engine.stages import Stages
from stable_audio_serve.engine.thread import EngineThread
from stable_audio_serve.engine.threads import plain_threads, steady_threads
from stable_audio_serve.engine.warmup import WarmUp
from stable_audio_serve.models.protocol import DiffusionModel, ModelSpec
from stable_audio_serve.sampling.noise import NoiseSource


@dataclass(frozen=True, slots=True)
class Machinery:
    """What an engine's methods use of it: they put requests into `inbox`, which `thread` takes; `drawers` draw noise,
    and closing them is the engine's.
    """

    thread: EngineThread
    inbox: Inbox
    memory: MemoryPlan
    predictor: Predictor
    drawers: Mapping[Priority, ThreadPoolExecutor]


def build_machinery(
    model: DiffusionModel,
    options: EngineOptions,
    *,
    device: Device,
    mode: Mode,
    admission: Admission,
    noise_factory: Callable[[int], NoiseSource],
    policy: BatchPolicy | None,
    scheduler: Callable[..., Scheduler],
    clock: Clock,
    metrics: Metrics,
) -> Machinery:
    """Returns the machinery of one engine, whose thread is not started; arguments as those of `Engine`.

    Raises ConfigError where the device's memory cannot be what the options say.
    """
    bounds = plan_memory(
        device.memory(), max_rows_bytes=options.max_memory_bytes, prompt_cache_bytes=options.prompt_cache_bytes
    )
    is_strict = mode == "strict"
    together = 1 if is_strict else options.slots
    inbox = Inbox()
    drawers = {priority: ThreadPoolExecutor(1, thread_name_prefix="noise") for priority in get_args(Priority)}
    cost = CostModel()
    chosen = policy or _own_policy(model.spec, options, device=device, cost=cost)
    pace = WindowPace(cost, is_fixed=is_strict)
    predictor = Predictor(cost, chosen, turn_frames=pace.turn_frames)
    max_tokens = 0 if isinstance(chosen, OneRowPerCall) else options.max_step_tokens
    memory = RowMemory(model.spec, max_bytes=bounds.rows, is_fixed=is_strict, setting=bounds.setting)
    stages = Stages(
        model,
        Executor(
            model,
            chosen,
            device=device,
            together=together,
            clock=clock,
            metrics=metrics,
            max_capture_bytes=bounds.captures,
        ),
        device=device,
        cost=cost,
        cache=PromptCache(options.prompt_cache_bytes),
        drawers=drawers,
        pace=pace,
        clock=clock,
        metrics=metrics,
    )
    loop = EngineLoop(
        model.spec,
        scheduler=scheduler(
            _limits(options, max_tokens=max_tokens, max_bytes=bounds.rows),
            knee_tokens=lambda frames: frames * chosen.crowd(1, frames),
            step_ms=predictor.step_ms,
            has_second_queue=device.has_second_queue,
        ),
        stages=stages,
        predictor=predictor,
        memory=memory,
        admission=admission,
        inbox=inbox,
        clock=clock,
        metrics=metrics,
    )
    warm_up = WarmUp(
        model,
        cost,
        policy=chosen,
        max_tokens=max_tokens,
        max_prompts=together,
        noise_factory=noise_factory,
        device=device,
        budget_s=options.warmup_budget_s,
    )

    def prepare() -> None:
        memory.measure(model, noise_factory)
        if options.warmup_budget_s > 0:
            warm_up.run()

    sharing = (steady_threads if is_strict and not device.shares_calls else plain_threads)(options.torch_threads)
    thread = EngineThread(loop, inbox, sharing=sharing, prepare=prepare, clock=clock)
    return Machinery(thread, inbox, bounds, predictor, drawers)


def _own_policy(spec: ModelSpec, options: EngineOptions, *, device: Device, cost: CostModel) -> BatchPolicy:
    return resolve_policy(
        options,
        device,
        cost=cost,
        pads_rows=spec.pads_rows,
        packs_rows=spec.packs_rows,
        packed=PackedShapes(spec.num_prefix, spec.max_frames) if spec.packs_segments else None,
    )


def _limits(options: EngineOptions, *, max_tokens: int, max_bytes: int | None) -> SchedulerLimits:
    return SchedulerLimits(
        max_started=options.max_rows,
        max_tokens=max_tokens,
        batch_share=options.batch_share,
        max_bytes=max_bytes,
    )
