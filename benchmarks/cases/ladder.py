"""The engine as there is more to do: more requests in flight, longer clips, and what its scheduler costs meanwhile.
Everything is in process; `memory` has the rest of the ladder.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

from benchmarks.cases.engine import compare_audio, describe_model, load
from benchmarks.client import send_in_flight, send_one_after_another, send_together
from benchmarks.compare.quiet import describe_quiet, wait_in_quiet
from benchmarks.metrics import audio_s_per_s, throughput_rps, worst_ratio
from benchmarks.settings import CaseSettings
from benchmarks.workload import PROMPTS
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.engine.scheduler import RowId, Scheduler
from stable_audio_serve.models.protocol import DiffusionModel

_STEPS = 8
_QUEUE_S = 36_000.0  # nothing is refused, however slow the machine
_COMPARED = {"cpu": (64, 8), "cuda": (256, 32)}  # in flight, many and few
_ACTIVE = (256, 32)
_FULL_SHARE = 0.9  # a turn counts while at least so many of the rows asked for are there


@dataclass(frozen=True, slots=True)
class LadderSizes:
    """How much is measured; a run has at least as many requests as are in flight."""

    in_flight: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    durations_s: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 10.0)
    lone_s: tuple[float, ...] = (1.0, 2.0, 2.5, 4.0, 8.0, 10.0, 12.0, 48.0)  # each timed by itself
    requests: int = 64  # of one cell of the table
    compared_requests: int = 160  # of one of the four runs of a round
    lone_clips: int = 10  # of each duration in a round
    turns: int = 100  # of the engine with so many active rows, for one round
    turns_s: float = 1.0  # at least


FULL = LadderSizes()
SHORT = LadderSizes(
    in_flight=(1, 8, 64),
    durations_s=(1.0, 4.0, 10.0),
    lone_s=(1.0, 2.5, 4.0, 10.0),
    requests=16,
    compared_requests=96,
    lone_clips=3,
    turns=40,
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the engine with `active` rows, `picked` of them: seconds it took, and of these the scheduler's."""

    active: int
    picked: int
    scheduler_s: float
    turn_s: float


class TimedScheduler(Scheduler):
    """Notes every turn that had work, from one pick to the next."""

    def __init__(
        self, *args: Any, note: Callable[[Turn], None], clock: Callable[[], float] = time.perf_counter, **kwargs: Any
    ) -> None:
        """`clock` returns seconds."""
        super().__init__(*args, **kwargs)
        self._note = note
        self._clock = clock
        self._own_s = 0.0
        self._turn: tuple[float, int, int] | None = None  # began at, with so many rows, so many of them picked

    def add(self, *args: Any, **kwargs: Any) -> None:
        self._timed(partial(super().add, *args, **kwargs))

    def remove(self, row_id: RowId) -> None:
        self._timed(partial(super().remove, row_id))

    def pick(self) -> list[RowId]:
        now = self._clock()
        if self._turn is not None:
            began_at, active, num_picked = self._turn
            self._note(Turn(active, num_picked, self._own_s, now - began_at))
        self._own_s, active = 0.0, len(self)
        picked: list[RowId] = self._timed(super().pick)
        self._turn = (now, active, len(picked)) if picked else None
        return picked

    def _timed(self, run: Callable[[], Any]) -> Any:
        started_at = self._clock()
        result = run()
        self._own_s += self._clock() - started_at
        return result


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
    scheduler = await _watch_scheduler(model, options, rounds=settings.rounds, sizes=sizes, duration_s=durations_s[0])
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


async def _watch_scheduler(
    model: DiffusionModel, options: EngineOptions, *, rounds: int, sizes: LadderSizes, duration_s: float
) -> dict[str, Any]:
    """What the scheduler takes of a turn in a running engine, with many and few active rows in turns."""
    watched: dict[int, list[list[Turn]]] = {active: [] for active in _ACTIVE}
    turns: list[Turn] = []
    async with Engine(model, options, scheduler=partial(TimedScheduler, note=turns.append)) as engine:
        for _ in range(rounds):
            for active in _ACTIVE:
                watched[active].append(
                    await _keep_active(engine, turns, active=active, sizes=sizes, duration_s=duration_s)
                )
    return summarize_turns(watched)


def summarize_turns(watched: dict[int, list[list[Turn]]]) -> dict[str, Any]:
    """From each round's turns by active rows: the scheduler's share of all time, and microseconds of the median turn.

    A fast engine picks more rows where more are active, so they are also stated by picked row.
    """
    many, few = max(watched), min(watched)
    figures: dict[str, Callable[[list[Turn]], float]] = {
        "share_of_step": lambda turns: sum(t.scheduler_s for t in turns) / sum(t.turn_s for t in turns),
        "us_per_step": lambda turns: median(t.scheduler_s * 1e6 for t in turns),
        "us_per_row": lambda turns: median(t.scheduler_s * 1e6 / t.picked for t in turns),
    }
    results: dict[str, Any] = {"scheduler_active_rows": [many, few]}
    for name, figure in figures.items():
        rounds = {active: [figure(turns) for turns in runs] for active, runs in watched.items()}
        pairs = list(zip(rounds[many], rounds[few], strict=True))
        results |= {
            f"scheduler_{name}": {str(active): median(values) for active, values in rounds.items()},
            f"scheduler_{name}_rounds": {str(active): values for active, values in rounds.items()},
            f"scheduler_{name}_many_over_few_ratio": worst_ratio(pairs, larger_is_better=False),
        }
    results["scheduler_worst_share_of_step"] = max(map(max, results["scheduler_share_of_step_rounds"].values()))
    results["scheduler_turns"] = {str(active): [len(turns) for turns in runs] for active, runs in watched.items()}
    return results


async def _keep_active(
    engine: Engine, turns: list[Turn], *, active: int, sizes: LadderSizes, duration_s: float
) -> list[Turn]:
    """Returns the turns with nearly `active` rows; what is in flight at the end is cancelled."""
    turns.clear()

    async def repeat(clip: GenerationRequest) -> None:
        while True:
            await engine.generate(clip)

    ends_at = time.perf_counter() + sizes.turns_s
    tasks = [asyncio.create_task(repeat(clip)) for clip in make_clips(active, duration_s=duration_s)]
    try:
        while time.perf_counter() < ends_at or len(_full(turns, active)) < sizes.turns:
            done, _ = await asyncio.wait(tasks, timeout=0.05, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # it failed: say so
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return _full(turns, active)


def _full(turns: Sequence[Turn], active: int) -> list[Turn]:
    return [turn for turn in list(turns) if _FULL_SHARE * active <= turn.active <= active]


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
            "scheduler_growth": results["scheduler_many_over_few_active_ratio"],
            "4x_frames": results["duration_4x_frames_time_ratio"],
        }
    ]
