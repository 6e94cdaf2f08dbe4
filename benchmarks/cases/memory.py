"""Measures whether the engine's memory grows while it serves many requests, in a new process."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.load import send_in_flight
from benchmarks.models import CaseSettings, load
from benchmarks.workload import draw_arrivals, to_request
from stable_audio_serve.engine import Engine, EngineOptions

_IN_FLIGHT = 8
# For the short and the full benchmark: number of requests in the list, number of repetitions of the list before the
# first reading of the memory, and number of all repetitions.
_SIZES = ((20, 3, 15), (40, 5, 25))


async def measure(settings: CaseSettings) -> dict[str, Any]:
    """Run `_measure` in a new process, whose memory no other benchmark has used."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return await asyncio.get_running_loop().run_in_executor(pool, _run, settings)


def _run(settings: CaseSettings) -> dict[str, Any]:
    return asyncio.run(_measure(settings))


async def _measure(settings: CaseSettings) -> dict[str, Any]:
    """Send the same list of requests of the mix `demo-fast` many times.

    Read the memory after each repetition, except the first few. The list is always the same, because the memory of a
    process also depends on its last few clips.
    """
    count, settled, times = _SIZES[settings.full]
    model = load(settings)
    options = EngineOptions(mode=settings.mode, torch_threads=settings.threads)
    card = model.spec.card
    arrivals = draw_arrivals("demo-fast", rate_hz=None, count=count, seed=1, max_duration_s=card.max_duration_s)
    requests = [to_request(arrival) for arrival in arrivals]
    held: list[int] = []
    async with Engine(model, options) as engine:
        for index in range(times):
            await send_in_flight(engine.generate, requests, num_in_flight=_IN_FLIGHT)
            if index + 1 >= settled:
                gc.collect()
                held.append(resident_bytes())
    return {
        "memory_requests": [count * settled, count * times],
        "memory_rss_mib": [count / 2**20 for count in held],
        "memory_rss_growth_share": growth_share(held),
    }


def growth_share(held: Sequence[int]) -> float:
    """Returns the relative growth from the minimum of the first half of the readings to the second half's minimum.

    Minimums are used because single readings vary by up to 7 %. For a steady leak, the result is half of the growth
    from the first reading to the last.
    """
    middle = len(held) // 2
    return min(held[middle:]) / min(held[:middle]) - 1.0


def resident_bytes() -> int:
    """Returns the physical memory of this process after its allocator has returned free memory. Works on Linux only."""
    with suppress(OSError, AttributeError):  # `malloc_trim` exists only in glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """Returns a table with the growth of the memory between two numbers of requests."""
    first, last = results["memory_requests"]
    return [{"from request": first, "to request": last, "growth": results["memory_rss_growth_share"]}]
