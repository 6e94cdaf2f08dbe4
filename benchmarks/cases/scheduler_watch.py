"""What the scheduler takes of a running engine's turns, many and few rows being active. The engine is given a scheduler
that notes its own time; nothing is replaced behind its back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from benchmarks.metrics import worst_ratio
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.engine.scheduling.scheduler import RowId, Scheduler
from stable_audio_serve.models.protocol import DiffusionModel

ACTIVE = (256, 32)
_FULL_SHARE = 0.9  # a turn counts while at least so many of the rows asked for are there


@dataclass(frozen=True, slots=True)
class WatchLimits:
    """For how many turns, and at least how many seconds, the engine is watched with so many rows in a round."""

    turns: int = 100
    turns_s: float = 1.0


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

    def pick(self, *, beside: bool = True) -> list[RowId]:
        now = self._clock()
        if self._turn is not None:
            began_at, active, num_picked = self._turn
            self._note(Turn(active, num_picked, self._own_s, now - began_at))
        self._own_s, active = 0.0, len(self)
        picked: list[RowId] = self._timed(partial(super().pick, beside=beside))
        self._turn = (now, active, len(picked)) if picked else None
        return picked

    def _timed(self, run: Callable[[], Any]) -> Any:
        started_at = self._clock()
        result = run()
        self._own_s += self._clock() - started_at
        return result


async def watch_scheduler(
    model: DiffusionModel,
    options: EngineOptions,
    *,
    rounds: int,
    limits: WatchLimits,
    clips: Sequence[GenerationRequest],
) -> dict[str, Any]:
    """What the scheduler takes of a turn in a running engine, with many and few active rows in turns."""
    watched: dict[int, list[list[Turn]]] = {active: [] for active in ACTIVE}
    turns: list[Turn] = []
    async with Engine(model, options, scheduler=partial(TimedScheduler, note=turns.append)) as engine:
        for _ in range(rounds):
            for active in ACTIVE:
                watched[active].append(await _keep_active(engine, turns, clips=clips[:active], limits=limits))
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
            f"scheduler_{name}_by_active_rows": {str(active): median(values) for active, values in rounds.items()},
            f"scheduler_{name}_rounds": {str(active): values for active, values in rounds.items()},
            f"scheduler_{name}_many_over_few_ratio": worst_ratio(pairs, larger_is_better=False),
        }
    results["scheduler_share_of_step"] = max(map(max, results["scheduler_share_of_step_rounds"].values()))
    results["scheduler_turns"] = {str(active): [len(turns) for turns in runs] for active, runs in watched.items()}
    return results


async def _keep_active(
    engine: Engine, turns: list[Turn], *, clips: Sequence[GenerationRequest], limits: WatchLimits
) -> list[Turn]:
    """Returns the turns with nearly as many rows as there are clips, each again and again until it is cancelled."""
    turns.clear()

    async def repeat(clip: GenerationRequest) -> None:
        while True:
            await engine.generate(clip)

    ends_at = time.perf_counter() + limits.turns_s
    tasks = [asyncio.create_task(repeat(clip)) for clip in clips]
    try:
        while time.perf_counter() < ends_at or len(_full(turns, len(clips))) < limits.turns:
            done, _ = await asyncio.wait(tasks, timeout=0.05, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # it failed: say so
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return _full(turns, len(clips))


def _full(turns: Sequence[Turn], active: int) -> list[Turn]:
    return [turn for turn in list(turns) if _FULL_SHARE * active <= turn.active <= active]
