"""How much of the machine other programs used meanwhile: a measurement beside which somebody else worked is void, and
repeated a few times.

A process counts as ours if it is this one or descends from it. What a process used counts with who waited for its end;
nobody waits for those of a parent that ignores SIGCHLD (Ray's raylet does), so they are looked at while they live.
Without psutil, or where the machine's counters cannot be read, nothing is known and nothing is void.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

try:
    import psutil

    _CAN_WATCH = True
except ImportError:  # a machine for engine benchmarks only
    _CAN_WATCH = False

LARGEST_FOREIGN_CORES = 0.1
MOST_REPEATS = 3  # of a void measurement
_LOOK_S = 1.0

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
    own, is_over = OwnTime(), threading.Event()

    def look() -> None:
        while not is_over.wait(_LOOK_S):
            own.total_s()

    machine_s, own_s, started_at = _machine_s(), own.total_s(), time.perf_counter()
    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield
    finally:
        is_over.set()
        looking.join()
    elapsed_s = time.perf_counter() - started_at
    watch.foreign_cores = max(0.0, (_machine_s() - machine_s) - (own.total_s() - own_s)) / max(elapsed_s, 1e-9)


def describe_quiet(watches: Sequence[Watch]) -> dict[str, Any]:
    """Whether all of the measurements count, and what disturbed each."""
    return {
        "is_void": not all(watch.is_quiet for watch in watches),
        "foreign_cores": [watch.foreign_cores for watch in watches],
    }


def _machine_s() -> float:
    times = psutil.cpu_times()
    return times.user + times.nice + times.system


class OwnTime:
    """Processor seconds of this process and its descendants, also of those that nobody waited for."""

    def __init__(self) -> None:
        self._this = psutil.Process()
        self._forgotten: dict[psutil.Process, float] = {}  # who will count with nobody, as last seen

    def total_s(self) -> float:
        """Returns what they have used; of one that is forgotten, until this was last asked while it lived."""
        living = {self._this: _used_s(self._this)}
        for process in self._this.children(recursive=True):
            try:
                living[process] = _used_s(process)
                if _forgets_children(process.ppid()):
                    self._forgotten[process] = living[process]
            except psutil.NoSuchProcess:
                continue
        ended = (used for process, used in self._forgotten.items() if process not in living)
        return sum(living.values()) + sum(ended)


def _used_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def _forgets_children(pid: int) -> bool:
    """Whether a process ignores SIGCHLD, as far as this system tells."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    ignored = int(status.split("\nSigIgn:")[1].split(maxsplit=1)[0], 16)
    return bool(ignored >> (signal.SIGCHLD - 1) & 1)
