"""Chooses an engine's mode (strict or fast) and its batch policy, and builds the engine thread and everything that runs
on that thread.

None of these objects holds a reference to the `Engine`. An `Engine` that is no longer used is therefore
garbage-collected, which ends its thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch

from stable_audio_serve.core.clock import Clock
from stable_audio_serve.core.generation import Mode, Priority
from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.engine.admission import Admission
from stable_audio_serve.engine.calls.executor import Executor
from stable_audio_serve.engine.calls.stages import Stages
from stable_audio_serve.engine.calls.warmup import WarmUp
from stable_audio_serve.engine.hardware.device import Device
from stable_audio_serve.engine.hardware.share import MemoryPlan, plan_memory
from stable_audio_serve.engine.hardware.threads import plain_threads, steady_threads
from stable_audio_serve.engine.loop import EngineLoop, EngineThread, Inbox
from stable_audio_serve.engine.options import EngineOptions, Features
from stable_audio_serve.engine.scheduling.batching import (
    AnyRows,
    BatchPolicy,
    EqualLengths,
    FixedSlots,
    GraphShapes,
    MergedGrid,
    OneRowPerCall,
    Packed,
    PackedGraphs,
)
from stable_audio_serve.engine.scheduling.cost import CostModel
from stable_audio_serve.engine.scheduling.memory import RowMemory
from stable_audio_serve.engine.scheduling.prediction import Predictor
from stable_audio_serve.engine.scheduling.scheduler import Scheduler, SchedulerLimits
from stable_audio_serve.models.protocol import AdaptableModel, DiffusionModel, ModelSpec
from stable_audio_serve.sampling.noise import NoiseSource

_NOISE_THREADS = 4  # one thread would take 13 to 27 ms to draw the noise of a step with 16,000 latent frames


def resolve_mode(options: EngineOptions, device: Device) -> Mode:
    """Return the mode that `options` set, else the device's default mode."""
    return options.mode or device.default_mode


def resolve_policy(
    spec: ModelSpec, options: EngineOptions, *, device: Device, features: Features, cost: CostModel
) -> BatchPolicy:
    """Return the policy that splits each denoising step into device calls.

    If `options.frame_grid` is set, fast mode never packs. On a device with `shares_calls` False, batch sizes are not
    rounded up.
    """
    grid = (options.frame_grid or device.frame_grid) if spec.pads_rows else 1
    if resolve_mode(options, device) == "strict":
        return FixedSlots(options.slots, grid) if device.shares_calls else OneRowPerCall(grid)
    knee_tokens = partial(cost.knee_tokens, fixed_share=options.fixed_share)
    may_pack = spec.pads_rows and options.frame_grid is None
    if may_pack and spec.packs_rows and not device.shares_calls:
        return Packed(knee_tokens)
    if may_pack and spec.packs_segments and features.packing:
        return PackedGraphs(knee_tokens, spec.num_prefix, spec.max_frames)
    shapes = (GraphShapes if device.shares_calls else AnyRows)(grid, options.max_step_tokens)

    def call_ms(rows: int, frames: int) -> float:
        return cost.call_ms("denoise", rows=rows, frames=frames)

    return (MergedGrid if spec.pads_rows else EqualLengths)(call_ms, knee_tokens, shapes)


@dataclass(frozen=True, slots=True)
class EngineParts:
    """The objects that the methods of `Engine` use.

    The methods put requests into `inbox`, and `thread` takes them from there. `noise_pools` are the threads that draw
    random noise; `Engine.close` shuts them down.
    """

    thread: EngineThread
    inbox: Inbox
    memory: RowMemory
    stages: Stages
    predictor: Predictor
    noise_pools: Mapping[Priority, ThreadPoolExecutor]


def build_parts(
    model: DiffusionModel,
    options: EngineOptions,
    *,
    device: Device,
    features: Features,
    mode: Mode,
    admission: Admission,
    noise_factory: Callable[[int], NoiseSource],
    policy: BatchPolicy | None,
    clock: Clock,
    metrics: Metrics,
) -> EngineParts:
    """Build the objects of one engine. The thread is not started. The arguments are as in `Engine`.

    Raises ConfigError if the options ask for more memory than the device has.
    """
    is_strict, cost, second = mode == "strict", CostModel(), device.has_second_queue
    policy = policy or resolve_policy(model.spec, options, device=device, features=features, cost=cost)
    plan = _plan_memory(model, options, device=device)
    max_prompts = 1 if is_strict else options.slots  # in one call of the text encoder
    inbox, predictor, noise_pools = Inbox(), Predictor(cost, policy), _noise_pools(device)
    memory = RowMemory(model.spec, plan, max_rows=options.max_rows, is_fixed=is_strict, has_second_queue=second)
    scheduler = build_scheduler(options, policy, predictor=predictor, has_second_queue=second, max_bytes=plan.rows)
    executor = Executor(
        model,
        policy,
        device=device,
        max_per_call=max_prompts,
        is_strict=is_strict,
        clock=clock,
        metrics=metrics,
        max_graph_bytes=plan.graphs,
        captures_off_file=options.captures_off_file,
        slot_table_bytes=options.lora_cache_bytes // 2,
    )
    stages = Stages(
        model,
        executor,
        device=device,
        cost=cost,
        prompt_cache_bytes=options.prompt_cache_bytes,
        noise_pools=noise_pools,
        is_fixed=is_strict,
        clock=clock,
        metrics=metrics,
    )
    loop = EngineLoop(
        model.spec,
        scheduler=scheduler,
        stages=stages,
        predictor=predictor,
        memory=memory,
        admission=admission,
        inbox=inbox,
        clock=clock,
        metrics=metrics,
    )

    def prepare() -> None:
        if plan.rows is not None or device.can_capture:
            executor.fix_memory(memory.measure(model, noise_factory))
        if options.warmup_budget_s > 0:
            WarmUp(
                model,
                cost,
                policy=policy,
                max_tokens=_max_tokens(options, policy),
                max_prompts=max_prompts,
                noise_factory=noise_factory,
                device=device,
                budget_s=options.warmup_budget_s,
            ).run()

    # Here, not in the engine thread: the default of a new thread is the number that another thread has set last.
    num_threads = options.torch_threads or torch.get_num_threads()
    use_threads = steady_threads if is_strict and not device.shares_calls else plain_threads
    thread = EngineThread(loop, inbox, sharing=use_threads(num_threads), prepare=prepare, clock=clock)
    return EngineParts(thread, inbox, memory, stages, predictor, noise_pools)


def _plan_memory(model: DiffusionModel, options: EngineOptions, *, device: Device) -> MemoryPlan:
    return plan_memory(
        device.memory(),
        max_rows_bytes=options.max_memory_bytes,
        prompt_cache_bytes=options.prompt_cache_bytes,
        lora_cache_bytes=options.lora_cache_bytes if isinstance(model, AdaptableModel) else 0,
        captures=device.can_capture,
    )


def _noise_pools(device: Device) -> dict[Priority, ThreadPoolExecutor]:
    num_threads = _NOISE_THREADS if device.shares_calls else 1  # on a CPU, steps need the cores
    return {priority: ThreadPoolExecutor(num_threads, thread_name_prefix="noise") for priority in get_args(Priority)}


def build_scheduler(
    options: EngineOptions,
    policy: BatchPolicy,
    *,
    predictor: Predictor,
    has_second_queue: bool,
    max_bytes: int | None = None,
) -> Scheduler:
    """Return the scheduler for these options. `max_bytes` limits the device memory of all clips in progress."""
    limits = SchedulerLimits(
        options.max_rows, _max_tokens(options, policy), batch_share=options.batch_share, max_bytes=max_bytes
    )
    return Scheduler(
        limits,
        knee_tokens=lambda frames: frames * policy.typical_rows(1, frames),
        step_ms=predictor.step_ms,
        has_second_queue=has_second_queue,
    )


def _max_tokens(options: EngineOptions, policy: BatchPolicy) -> int:
    """Return the scheduler's limit of latent frames per step; 0 makes it pick one row at a time."""
    return 0 if isinstance(policy, OneRowPerCall) else options.max_step_tokens
