"""The search for the highest good rate, with a server on a virtual clock."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import compare
from benchmarks.cases import run
from benchmarks.compare import Run, RunOptions
from benchmarks.load import Answer, Record
from benchmarks.report import Pieces
from benchmarks.workload import Arrival


class VirtualServer:
    """Serves one request at a time, first come, first served, each in `served_s`. Nothing waits for its clock."""

    def __init__(self, served_s: float) -> None:
        self._served_s = served_s

    async def ask(self, _: Arrival) -> Answer:
        return Answer({}, 1, lambda: np.ones((2, 1), dtype=np.float32))

    async def settle(self) -> None:
        """Nothing to wait for."""

    async def play(self, arrivals: Iterable[Arrival]) -> list[Record]:
        now, records = 0.0, []
        for index, arrival in enumerate(arrivals):
            now = max(now, arrival.at_s) + self._served_s
            records.append(Record(index, arrival.at_s, now, arrival.duration_s, arrival.steps))
        return records


async def play(server: VirtualServer, arrivals: Iterable[Arrival]) -> list[Record]:
    return await server.play(arrivals)


async def play_alone(server: VirtualServer, arrivals: Iterable[Arrival]) -> list[Record]:
    return [(await server.play([replace(arrival, at_s=0.0)]))[0] for arrival in arrivals]


@pytest.fixture(autouse=True)
def virtual_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "play", play)
    monkeypatch.setattr(compare, "play_alone", play_alone)


async def measure(folder: Path, *, served_s: float, trials: int = 3, is_watched: bool = False) -> dict[str, Any]:
    """Returns the results of a short comparison whose only side is a VirtualServer."""
    options = RunOptions("demo-fast", ("fifo",), 13.0, count=30, rounds=1, goodput_trials=trials)
    pieces = Pieces(folder, {})
    return await Run({"fifo": VirtualServer(served_s)}, options, pieces=pieces, is_watched=is_watched).measure()


async def test_a_rate_that_was_not_tried_is_not_reported(tmp_path: Path) -> None:
    results = await measure(tmp_path, served_s=0.05, trials=1)
    assert results["sides"]["fifo"]["goodput"] == {"good_rps": pytest.approx(0.7 / 0.05), "bad_rps": None}
    (row,) = run.rows(results)
    assert row["goodput (1/s)"] == "above 14.00"


@pytest.mark.parametrize("served_s", [0.01, 0.05, 1.0])
async def test_a_rate_above_the_capacity_is_not_good(served_s: float, tmp_path: Path) -> None:
    results = await measure(tmp_path, served_s=served_s, trials=6)
    bracket, capacity_rps = results["sides"]["fifo"]["goodput"], 1.0 / served_s
    assert 0.2 * capacity_rps < bracket["good_rps"] < bracket["bad_rps"] < 1.2 * capacity_rps


async def test_other_programs_make_a_tried_rate_void(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign_cores = iter([0.0, 0.0, 0.5])  # of the capacity, the latency and the trial

    async def watch(play: Callable[[], Awaitable[Any]]) -> tuple[Any, float]:
        return await play(), next(foreign_cores)

    monkeypatch.setattr(compare, "in_quiet", watch)
    results = await measure(tmp_path, served_s=0.05, trials=1, is_watched=True)
    assert (results["foreign_cores"], results["is_void"]) == ([0.0, 0.0, 0.5], True)
