"""What the parts of a step cost the host by themselves, in microseconds, and what can be counted without a GPU: copies,
waits and kernel launches. Everything is in this process but what needs the stand-in device.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.arrivals import draw_arrivals
from benchmarks.cases.engine import load
from benchmarks.counting.host_work import KINDS, REQUESTS, Family, Setting, count, run_apart
from benchmarks.counting.launches import count_model
from benchmarks.metrics import worst_ratio
from benchmarks.settings import CaseSettings
from benchmarks.simulate.engine import GPU, fit_cost
from benchmarks.simulate.roofline import SMALL, h200
from benchmarks.workload import noise_audio
from stable_audio_serve.audio.encode import AudioFormat, encode_audio, to_pcm16
from stable_audio_serve.core.generation import GenerationRequest, Mode
from stable_audio_serve.engine.build import resolve_policy
from stable_audio_serve.engine.options import EngineOptions
from stable_audio_serve.engine.prediction import Predictor
from stable_audio_serve.engine.scheduling.batching import BatchPolicy
from stable_audio_serve.engine.scheduling.cost import CostModel
from stable_audio_serve.engine.scheduling.scheduler import RowId, Scheduler, SchedulerLimits
from stable_audio_serve.engine.scheduling.work import RowWork
from stable_audio_serve.models.protocol import DiffusionModel, StepBatch
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.sampling.guidance import GuidanceBatch, guide
from stable_audio_serve.sampling.noise import SeededNoise
from stable_audio_serve.sampling.plan import Guidance
from stable_audio_serve.sampling.samplers import build_plan
from stable_audio_serve.sampling.update import StepTerms, advance, network_input

_MODES: tuple[Mode, ...] = ("fast", "strict")
_ACTIVE = (8, 32, 256)
_LANES = (8, 32, 64)
_ROWS, _CHANNELS, _FRAMES = 8, 256, 384  # a step of small: eight rows of 30 s
_SAMPLE_RATE_HZ = 44_100


@dataclass(frozen=True, slots=True)
class MicroSizes:
    """How much is measured."""

    repetitions: int = 1000  # of what takes microseconds, in each round
    slow_repetitions: int = 15  # of what takes milliseconds
    clip_s: float = 10.0  # that is encoded to files
    kinds: Mapping[Family, tuple[str, ...]] = field(default_factory=lambda: KINDS)  # of requests, on the stand-in
    models: tuple[str, ...] = ("small-music", "medium")  # whose launches are counted


SHORT = MicroSizes(repetitions=300, slow_repetitions=7, clip_s=5.0, kinds=dict.fromkeys(KINDS, REQUESTS))


def run_micro_case(settings: CaseSettings, *, sizes: MicroSizes | None = None) -> dict[str, Any]:
    """Medians over all rounds; the worse round counts for ratios."""
    sizes = sizes or (MicroSizes() if settings.full else SHORT)
    torch.set_num_threads(settings.threads)
    return {
        "rounds": settings.rounds,
        "repetitions_per_round": sizes.repetitions,
        "slow_repetitions_per_round": sizes.slow_repetitions,
        **time_scheduler(settings.rounds, sizes.repetitions),
        **time_tensors(load(settings), settings.rounds, sizes=sizes),
        **time_encoders(settings.rounds, sizes=sizes),
        **count_host_work(sizes.kinds),
        **count_launches(sizes.models),
    }


def time_scheduler(rounds: int, repetitions: int) -> dict[str, Any]:
    """A pick among rows of the mix `small-mixed`, and the split of picked rows into device calls.

    The cost model is fitted to an H200 with captured steps, which also says how long the picked rows' step takes: where
    more rows wait a pick returns more of them, so it is stated as a share of the step that it fills.
    """
    device = h200(SMALL)
    policy, cost = build_policy()
    schedulers = {active: fill_scheduler(active, policy=policy, cost=cost) for active in _ACTIVE}
    lanes = {count: [work.lane for work in draw_works(count)] for count in _LANES}
    picks: dict[str, Callable[[], object]] = {str(active): scheduler.pick for active, scheduler in schedulers.items()}
    splits: dict[str, Callable[[], object]] = {str(count): partial(policy.split, some) for count, some in lanes.items()}
    pick_us = time_in_turns(picks, rounds=rounds, repetitions=repetitions)
    split_us = time_in_turns(splits, rounds=rounds, repetitions=repetitions)
    num_picked, step_us = {}, {}
    for active, scheduler in schedulers.items():
        works, picked = draw_works(active), scheduler.pick()
        calls = policy.split([works[row_id].lane for row_id in picked])
        num_picked[str(active)] = len(picked)
        step_us[str(active)] = 1000.0 * sum(device.step_ms(call.rows, call.frames) for call in calls)
    shares = {name: [us / step_us[name] for us in rounds_us] for name, rounds_us in pick_us.items()}
    pairs = list(zip(shares["256"], shares["32"], strict=True))
    return {
        "scheduler_pick_us": medians(pick_us),
        "scheduler_picked_rows": num_picked,
        "scheduler_share_of_captured_step": medians(shares),
        "scheduler_share_256_over_32_active_ratio": worst_ratio(pairs, larger_is_better=False),
        "scheduler_share_256_over_32_active_ratio_rounds": [many / few for many, few in pairs],
        "split_us": medians(split_us),
    }


def build_policy() -> tuple[BatchPolicy, CostModel]:
    """Returns the fast mode's policy and cost model as they are for small on an H200."""
    network = SMALL
    cost = CostModel()
    policy = resolve_policy(EngineOptions(), GPU, cost=cost)
    fit_cost(cost, h200(network), policy=policy, longest_frames=network.frames(120.0), limits=SchedulerLimits())
    return policy, cost


def draw_works(num_rows: int) -> list[RowWork]:
    """Returns the work of rows of `small-mixed`, each somewhere among its steps."""
    rng = random.Random(1)
    works = []
    for arrival in draw_arrivals("small-mixed", rate_hz=None, count=num_rows, seed=1, max_duration_s=120.0):
        frames = SMALL.frames(arrival.duration_s)
        work = RowWork(frames, branches=[1 + arrival.is_guided] * arrival.steps, decode_left=(frames,))
        for _ in range(rng.randrange(arrival.steps)):
            work.finish_evaluation()
        works.append(work)
    return works


def fill_scheduler(num_rows: int, *, policy: BatchPolicy, cost: CostModel) -> Scheduler:
    """Returns an engine's scheduler with so many rows."""
    options = EngineOptions()
    predictor = Predictor(cost, policy, turn_frames=options.turn_frames)
    scheduler = Scheduler(
        SchedulerLimits(options.max_rows, options.max_step_tokens, options.slack, options.max_slack_s),
        knee_tokens=lambda frames: frames * policy.typical_rows(1, frames),
        step_ms=predictor.step_ms,
    )
    for index, work in enumerate(draw_works(num_rows)):
        alone_s = predictor.alone_ms(work) / 1000.0
        scheduler.add(RowId(index), work, arrived_at=0.01 * index, alone_s=alone_s)
    return scheduler


def time_tensors(model: DiffusionModel, rounds: int, *, sizes: MicroSizes) -> dict[str, Any]:
    """What surrounds the network in a step of eight rows of 30 s: noise, guidance, update; and, of the case's model,
    putting the rows' conditioning together.
    """
    shape = (_ROWS, _CHANNELS, _FRAMES)
    generator = torch.Generator().manual_seed(1)
    x, velocity, unconditional, noise = (torch.randn(shape, generator=generator) for _ in range(4))
    times, valid = torch.full((_ROWS,), 0.5), torch.ones(_ROWS, _FRAMES, dtype=torch.bool)
    guidance = [Guidance(cfg_scale=4.0)] * _ROWS
    evaluation = build_plan(
        "pingpong", torch.linspace(1.0, 0.0, 9), guidance=guidance[0], has_source=False
    ).evaluations[0]
    evaluations, state = [evaluation] * _ROWS, x[:, None]
    source = SeededNoise(1)

    def run_guidance() -> object:
        rows = GuidanceBatch.of(guidance)
        return guide(x, times, conditional=velocity, unconditional=unconditional, valid=valid, rows=rows)

    def run_update() -> object:
        terms = StepTerms.of(evaluations)
        network_input(state, terms)
        return advance(state, terms, velocity=velocity, noise=noise)

    parts: dict[str, Callable[[], object]] = {
        "noise_draw_per_row": lambda: source.step((_CHANNELS, _FRAMES)),
        "guidance_of_8_rows": run_guidance,
        "update_of_8_rows": run_update,
    }
    if isinstance(model, Sa3Model):
        parts["collate_of_8_rows"] = prepare_collate(model)
    with torch.inference_mode():
        taken_us = time_in_turns(parts, rounds=rounds, repetitions=sizes.slow_repetitions)
    return {f"{name}_us": value for name, value in medians(taken_us).items()}


def prepare_collate(model: Sa3Model) -> Callable[[], object]:
    """Returns a function that puts together the conditioning of eight rows of unlike lengths."""
    prompt = model.encode_text(["rain on a roof"])[0]
    rows, longest = [], 0
    for index in range(_ROWS):
        duration_s = model.spec.card.max_duration_s * (index + 1) / _ROWS
        plan = model.plan(GenerationRequest(prompt="rain on a roof", duration_s=duration_s, seed=index))[0]
        branch = model.condition(plan, prompt=prompt, negative=None, inpaint_latents=None).conditional
        rows.append(branch)
        longest = max(longest, plan.frames)
    x, valid = torch.zeros(_ROWS, 1, longest), torch.ones(_ROWS, longest, dtype=torch.bool)
    return lambda: StepBatch.of(x, t=torch.zeros(_ROWS), valid=valid, branches=rows)


def time_encoders(rounds: int, *, sizes: MicroSizes) -> dict[str, Any]:
    """Milliseconds of one core per second of stereo audio, by file format; the audio is noise that fades."""
    audio = noise_audio(2, duration_s=sizes.clip_s, sample_rate_hz=_SAMPLE_RATE_HZ).samples
    audio = audio * np.linspace(1.0, 0.0, audio.shape[1], dtype=np.float32)
    parts: dict[str, Callable[[], object]] = {
        str(file_format): partial(encode_audio, audio, _SAMPLE_RATE_HZ, file_format=file_format)
        for file_format in AudioFormat
    }
    parts["int16"] = lambda: to_pcm16(audio)
    taken_us = time_in_turns(parts, rounds=rounds, repetitions=max(1, sizes.slow_repetitions // 3))
    return {
        "encode_ms_per_audio_s": {name: us / 1000.0 / sizes.clip_s for name, us in medians(taken_us).items()},
    }


def count_host_work(kinds: Mapping[Family, Sequence[str]]) -> dict[str, Any]:
    """Returns what the host did in every engine call, by kind of request, mode and precision."""
    settings = []
    for family, own in kinds.items():
        for mode in _MODES:
            settings += [Setting(kind, mode, "float32", family) for kind in own]
        settings.append(Setting("mixed", "fast", "float16", family))
    return summarize_host_work(list(zip(settings, run_apart(count, settings), strict=True)))


def summarize_host_work(counted: Sequence[tuple[Setting, dict[str, dict[str, Any]]]]) -> dict[str, Any]:
    """Returns the figures of each setting, and of the worst step among them."""
    steps = [calls["denoise"] for _, calls in counted]
    return {
        "host_blocking_copies_per_step": max(step["blocking_copies"] for step in steps),
        "host_waits_per_step": max(step["waits"] for step in steps),
        "host_asynchronous_copies_per_step": max(step["asynchronous_copies"] for step in steps),
        "host_mix_ups": max(call["mix_ups"] for _, calls in counted for call in calls.values()),
        "host_work": [{**asdict(setting), "calls": calls} for setting, calls in counted],
    }


def count_launches(models: Sequence[str]) -> dict[str, Any]:
    """Returns launches by model, and those of a layer by themselves."""
    counted = {name: count_model(name) for name in models}
    return {
        "launches_per_layer": {name: figures["launches_per_layer"] for name, figures in counted.items()},
        "graph_breaks_per_layer": {name: figures["graph_breaks_per_layer"] for name, figures in counted.items()},
        "launches": counted,
    }


def time_in_turns(
    parts: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    repetitions: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Returns the median microseconds of each part in each round, all parts in turns; each runs once before.

    `clock` returns seconds.
    """
    for run in parts.values():
        run()
    medians_us: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        taken_us: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(repetitions):
            for name, run in parts.items():
                started_at = clock()
                run()
                taken_us[name].append((clock() - started_at) * 1e6)
        for name, values in taken_us.items():
            medians_us[name].append(median(values))
    return medians_us


def medians(rounds_us: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Returns the median round of each part."""
    return {name: median(values) for name, values in rounds_us.items()}


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """The parts of a step by themselves, and what can be counted without a GPU."""
    return [
        {
            "pick_256_us": results["scheduler_pick_us"]["256"],
            "pick_share_of_step": results["scheduler_share_of_captured_step"]["256"],
            "share_256_over_32": results["scheduler_share_256_over_32_active_ratio"],
            "copies_per_step": results["host_blocking_copies_per_step"],
            "waits_per_step": results["host_waits_per_step"],
            "mix_ups": results["host_mix_ups"],
            **{f"launches_per_layer_{name}": count for name, count in results["launches_per_layer"].items()},
        }
    ]
