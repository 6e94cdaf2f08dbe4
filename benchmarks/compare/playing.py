"""Sends a list of arrivals to one side, open loop, and keeps what became of each request. Knows no other side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.arrivals import Arrival, ArrivalList
from benchmarks.client import Now, play_open_loop
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

    async def ask(numbered: tuple[int, Arrival], now: Now) -> Record:
        index, arrival = numbered
        try:
            answer: Answer | None = await asker.ask(arrival)
        except RefusedError:
            answer = None
        ended_at = now()
        on_end()
        return Record(
            index=index,
            due_at=arrival.at_s,
            ended_at=ended_at,
            audio_s=arrival.duration_s,
            steps=arrival.steps,
            stages_ms=answer.stages_ms if answer else {},
            refused=answer is None,
        )

    return await play_open_loop(list(enumerate(arrivals)), ask, due_at=lambda numbered: numbered[1].at_s)


def write_records(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Records as JSON."""
    return [asdict(record) for record in records]


def read_records(values: Sequence[Mapping[str, Any]]) -> list[Record]:
    """What `write_records` wrote."""
    return [Record(**value) for value in values]
