"""Sends a list of arrivals to one side, open loop, and keeps what became of each request. Knows no other side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.arrivals import Arrival, ArrivalList
from benchmarks.compare.asking import Answer, Asker, RefusedError
from benchmarks.metrics import Finished


@dataclass(frozen=True, slots=True)
class Record:
    """One request of a list, times in seconds from the list's start; `stages_ms` is what the side said of itself."""

    index: int
    due_at: float
    ended_at: float
    audio_s: float
    steps: int
    stages_ms: Mapping[str, float]
    refused: bool = False

    @property
    def latency_ms(self) -> float:
        """From the scheduled arrival to the last byte."""
        return (self.ended_at - self.due_at) * 1000.0

    @property
    def finished(self) -> Finished:
        """The same for figures that need no more."""
        return Finished(self.due_at, self.ended_at, self.audio_s)


async def play(
    asker: Asker, arrivals: ArrivalList | Sequence[Arrival], *, on_end: Callable[[], object] = lambda: None
) -> list[Record]:
    """Each request at its own time, however late the others are. Raises what a request raises, except refusals."""
    started_at = time.perf_counter()

    async def one(index: int, arrival: Arrival) -> Record:
        await asyncio.sleep(max(0.0, started_at + arrival.at_s - time.perf_counter()))
        try:
            answer: Answer | None = await asker.ask(arrival)
        except RefusedError:
            answer = None
        on_end()
        return Record(
            index=index,
            due_at=arrival.at_s,
            ended_at=(answer.ended_at if answer else time.perf_counter()) - started_at,
            audio_s=arrival.duration_s,
            steps=arrival.steps,
            stages_ms=answer.stages_ms if answer else {},
            refused=answer is None,
        )

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(index, arrival)) for index, arrival in enumerate(arrivals)]
    return [task.result() for task in tasks]


def write_records(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Records as JSON."""
    return [asdict(record) for record in records]


def read_records(values: Sequence[Mapping[str, Any]]) -> list[Record]:
    """What `write_records` wrote."""
    return [Record(**value) for value in values]
