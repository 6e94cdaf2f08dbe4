"""How much of the machine other programs used meanwhile: a measurement beside which somebody else worked is void, and
repeated a few times.

A process counts as ours if it is this one or descends from it. Without psutil, or where the machine's counters cannot
be read, nothing is known and nothing is void.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

try:
    import psutil

    _CAN_WATCH = True
except ImportError:  # a machine for engine benchmarks only
    _CAN_WATCH = False

LARGEST_FOREIGN_CORES = 0.1
MOST_REPEATS = 3  # of a void measurement

Measured = TypeVar("Measured")


@dataclass(slots=True)
class Watch:
    """`foreign_cores` used by other programs on average, None if unknown."""

    foreign_cores: float | None = None

    @property
    def is_quiet(self) -> bool:
        """Whether the measurement counts."""
        return self.foreign_cores is None or self.foreign_cores <= LARGEST_FOREIGN_CORES


def until_quiet(watch: Watch) -> Iterator[int]:
    """Gives turns to measure in: at most `MOST_REPEATS` + 1, none after one in which others left the machine alone.
    The watch is that of the last turn, filled at its end."""
    for turn in range(1 + MOST_REPEATS):
        with watching(watch):
            yield turn
        if watch.is_quiet:
            return


def measure_in_quiet(measure: Callable[[], Measured]) -> tuple[Measured, Watch]:
    """Measure again until others left the machine alone. Returns the last measurement and its watch."""
    watch = Watch()
    for _ in until_quiet(watch):
        measured = measure()
    return measured, watch


async def wait_in_quiet(measure: Callable[[], Awaitable[Measured]]) -> tuple[Measured, Watch]:
    """The same for what is awaited."""
    watch = Watch()
    for _ in until_quiet(watch):
        measured = await measure()
    return measured, watch


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Fills the watch at the end."""
    if not _CAN_WATCH:
        yield
        return
    machine_s, own_s, started_at = _machine_s(), _own_s(), time.perf_counter()
    yield
    elapsed_s = time.perf_counter() - started_at
    watch.foreign_cores = max(0.0, (_machine_s() - machine_s) - (_own_s() - own_s)) / max(elapsed_s, 1e-9)


def describe_quiet(watches: Sequence[Watch]) -> dict[str, Any]:
    """Whether all of the measurements count, and what disturbed each."""
    return {
        "is_void": not all(watch.is_quiet for watch in watches),
        "foreign_cores": [watch.foreign_cores for watch in watches],
    }


def _machine_s() -> float:
    times = psutil.cpu_times()
    return times.user + times.nice + times.system


def _own_s() -> float:
    """Processor seconds of this process and its living descendants; ended ones count with who waited for them."""
    total = 0.0
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total
