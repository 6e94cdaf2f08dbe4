"""The engine as there is more to do: more requests in flight, longer clips, and what its scheduler costs meanwhile.
Everything is in process; `memory` has the rest of the ladder.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from benchmarks.cases.engine import compare_audio, describe_model, load
from benchmarks.cases.scheduler_watch import ACTIVE, WatchLimits, watch_scheduler
from benchmarks.client import send_in_flight, send_one_after_another, send_together
from benchmarks.compare.quiet import describe_quiet, wait_in_quiet
from benchmarks.metrics import audio_s_per_s, throughput_rps, worst_ratio
from benchmarks.settings import CaseSettings
from benchmarks.workload import PROMPTS
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models.protocol import DiffusionModel

_STEPS = 8
_QUEUE_S = 36_000.0  # nothing is refused, however slow the machine
_COMPARED = {"cpu": (64, 8), "cuda": (256, 32)}  # in flight, many and few


@dataclass(frozen=True, slots=True)
class LadderSizes:
    """How much is measured; a run has at least as many requests as are in flight."""

    in_flight: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    durations_s: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 10.0)
    lone_s: tuple[float, ...] = (1.0, 2.0, 2.5, 4.0, 8.0, 10.0, 12.0, 48.0)  # each timed by itself
    requests: int = 64  # of one cell of the table
    compared_requests: int = 160  # of one of the four runs of a round
    lone_clips: int = 10  # of each duration in a round
    watch: WatchLimits = field(default_factory=WatchLimits)


FULL = LadderSizes()
SHORT = LadderSizes(
    in_flight=(1, 8),
    durations_s=(1.0, 10.0),
    lone_s=(1.0, 2.5, 4.0, 10.0),
    requests=8,
    compared_requests=80,
    lone_clips=3,
    watch=WatchLimits(turns=40),
)


async def run_ladder_case(
    model: DiffusionModel, settings: CaseSettings, *, sizes: LadderSizes | None = None
) -> dict[str, Any]:
    """One mode of the engine; the worse round counts. Raises RuntimeError if audio depends on the company."""
    sizes = sizes or (FULL if settings.full else SHORT)
    longest_s = model.spec.card.max_duration_s
    durations_s = sorted({min(duration_s, longest_s) for duration_s in sizes.durations_s})
    options = EngineOptions(
        mode=settings.mode,  # type: ignore[arg-type]
        torch_threads=settings.threads,
        max_queue_s=_QUEUE_S,
    )
    async with Engine(model, options) as engine:
        requests = make_clips(sizes.in_flight[-1], duration_s=durations_s[0])
        alone, _ = await send_one_after_another(engine.generate, requests[:4])
        together, _ = await send_together(engine.generate, requests)
        difference = compare_audio(alone, together[:4], mode=engine.mode)
        compared = await _compare_in_flight(engine, settings, sizes=sizes, duration_s=durations_s[0])
        lone_s = [duration_s for duration_s in sizes.lone_s if duration_s <= longest_s]
        lone = await _time_lone_clips(engine, lone_s, rounds=settings.rounds, clips=sizes.lone_clips)
        table = [
            await _fill_cell(engine, in_flight, duration_s=duration_s, requests=sizes.requests)
            for duration_s in durations_s
            for in_flight in sizes.in_flight
        ]
    clips = make_clips(max(ACTIVE), duration_s=durations_s[0])
    scheduler = await watch_scheduler(model, options, rounds=settings.rounds, limits=sizes.watch, clips=clips)
    return {
        "model": describe_model(model),
        "mode": engine.mode,
        "sizes": asdict(sizes),
        "largest_difference": difference,
        **compared,
        **scheduler,
        **lone,
        "table": table,
    }


def make_clips(count: int, *, duration_s: float) -> list[GenerationRequest]:
    """Requests of equal work without headroom, so that their frames are as their durations."""
    return [
        GenerationRequest(
            prompt=PROMPTS[index % len(PROMPTS)],
            duration_s=duration_s,
            seed=index,
            steps=_STEPS,
            duration_padding_s=0.0,
        )
        for index in range(count)
    ]


async def _compare_in_flight(
    engine: Engine, settings: CaseSettings, *, sizes: LadderSizes, duration_s: float
) -> dict[str, Any]:
    """Throughput of many in flight over that of few, A B A B."""
    compared = many, few = _COMPARED[engine.device.type]
    requests = make_clips(max(sizes.compared_requests, many), duration_s=duration_s)

    async def play_round() -> tuple[float, float]:
        rates_hz: dict[int, list[float]] = {many: [], few: []}
        for in_flight in (*compared, *compared):
            finished = await send_in_flight(engine.generate, requests, num_in_flight=in_flight)
            rates_hz[in_flight].append(throughput_rps(finished))
        return sum(rates_hz[many]), sum(rates_hz[few])

    measured = [await wait_in_quiet(play_round) for _ in range(settings.rounds)]
    rounds = [rates_hz for rates_hz, _ in measured]
    return {
        "concurrency_in_flight": compared,
        "concurrency_clip_s": duration_s,
        "concurrency_requests_per_run": len(requests),
        "concurrency_throughput_ratio": worst_ratio(rounds, larger_is_better=True),
        "concurrency_throughput_ratio_rounds": [ours / theirs for ours, theirs in rounds],
        "concurrency_throughput_rps": {
            str(in_flight): median(rates[side] / 2 for rates in rounds) for side, in_flight in enumerate(compared)
        },
        **describe_quiet([watch for _, watch in measured]),
    }


async def _time_lone_clips(engine: Engine, durations_s: Sequence[float], *, rounds: int, clips: int) -> dict[str, Any]:
    """The time of a clip by itself, all durations in turns."""
    medians_ms: dict[float, list[float]] = {duration_s: [] for duration_s in durations_s}
    for _ in range(rounds):
        taken_ms: dict[float, list[float]] = {duration_s: [] for duration_s in durations_s}
        for _ in range(clips):
            for duration_s in durations_s:
                started_at = time.perf_counter()
                await engine.generate(make_clips(1, duration_s=duration_s)[0])
                taken_ms[duration_s].append((time.perf_counter() - started_at) * 1000.0)
        for duration_s, values in taken_ms.items():
            medians_ms[duration_s].append(median(values))
    return summarize_lone_clips(medians_ms)


def summarize_lone_clips(medians_ms: dict[float, list[float]]) -> dict[str, Any]:
    """From the milliseconds of each round by duration: the largest ratio between a clip and one of a quarter."""
    ratios = {
        f"{duration_s:g} s over {duration_s / 4:g} s": [
            long / short for long, short in zip(values, medians_ms[duration_s / 4], strict=True)
        ]
        for duration_s, values in medians_ms.items()
        if duration_s / 4 in medians_ms
    }
    return {
        "duration_lone_ms": {f"{duration_s:g}": median(values) for duration_s, values in medians_ms.items()},
        "duration_4x_frames_time_ratio": max((max(values) for values in ratios.values()), default=None),
        "duration_4x_frames_time_ratio_rounds": ratios,
    }


async def _fill_cell(engine: Engine, in_flight: int, *, duration_s: float, requests: int) -> dict[str, Any]:
    clips = make_clips(max(requests, in_flight), duration_s=duration_s)
    finished = await send_in_flight(engine.generate, clips, num_in_flight=in_flight)
    return {
        "duration_s": duration_s,
        "in_flight": in_flight,
        "requests": len(clips),
        "requests_per_s": throughput_rps(finished),
        "audio_s_per_gpu_s": audio_s_per_s(finished),
    }


async def run_ladder(settings: CaseSettings) -> dict[str, Any]:
    """`run_ladder_case` on the model of these settings."""
    return await run_ladder_case(load(settings), settings)


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """More in flight, longer clips, and the scheduler's share."""
    return [
        {
            "mode": results["mode"],
            "in_flight": results["concurrency_in_flight"],
            "throughput": results["concurrency_throughput_ratio"],
            "scheduler_share": results["scheduler_share_of_step"],
            "active": results["scheduler_active_rows"],
            "scheduler_us_per_row": results["scheduler_us_per_row_many_over_few_ratio"],
            "4x_frames": results["duration_4x_frames_time_ratio"],
        }
    ]
