"""Records the processor time that other programs use during a measurement.

If they use too much, the measurement is void and is repeated a few times. All processes except this one and its
descendants are other programs.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import psutil  # not installed on every machine, so imported only where needed

LARGEST_FOREIGN_CORES = 0.1
_MOST_REPEATS = 3  # how often a void measurement is repeated

Measured = TypeVar("Measured")


async def in_quiet(measure: Callable[[], Awaitable[Measured]]) -> tuple[Measured, float]:
    """Call `measure`, and repeat the call a few times if other programs disturb it.

    Returns the last result, and the mean number of cores that other programs used during the last call.
    """
    for _ in range(1 + _MOST_REPEATS):
        before, machine_s, started_at = _own_s(), _machine_s(), time.perf_counter()
        measured = await measure()
        elapsed_s, used_s = time.perf_counter() - started_at, _machine_s() - machine_s
        own_s = sum(max(0.0, now_s - before.get(pid, 0.0)) for pid, now_s in _own_s().items())
        foreign_cores = max(0.0, used_s - own_s) / elapsed_s
        if foreign_cores <= LARGEST_FOREIGN_CORES:
            break
    return measured, foreign_cores


def describe_quiet(foreign_cores: Sequence[float | None]) -> dict[str, Any]:
    """Returns a dict that says whether any measurement is void, and how many cores other programs used in each.

    None stands for a measurement that was not watched.
    """
    is_void = any(cores is not None and cores > LARGEST_FOREIGN_CORES for cores in foreign_cores)
    return {"is_void": is_void, "foreign_cores": list(foreign_cores)}


def _machine_s() -> float:
    import psutil

    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def _own_s() -> dict[int, float]:
    """Returns the processor time of this process and its descendants in seconds, by process id."""
    import psutil

    used: dict[int, float] = {}
    for process in family():
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            used[process.pid] = float(times.user + times.system)
    return used


def family(pid: int | None = None) -> list[psutil.Process]:
    """Returns a process (default: this one) and its descendants, or an empty list if the process has ended."""
    import psutil

    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.Error:
        return []
