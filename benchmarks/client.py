"""How a workload is sent: each at its own time (open loop), all at once, one after another, or so many at a time; and
from which process. Knows no model.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from benchmarks.metrics import Finished
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult

Send = Callable[[GenerationRequest], Awaitable[GenerationResult]]
Run = tuple[list[GenerationResult], list[Finished]]
Now = Callable[[], float]  # seconds since a list began
Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


async def play_open_loop(
    items: Sequence[Item],
    send: Callable[[Item, Now], Awaitable[Outcome]],
    *,
    due_at: Callable[[Item], float],
    starts_in_s: float = 0.0,
) -> list[Outcome]:
    """Send each item at its own time, however late the others are; `due_at` is in seconds from the list's start.

    Returns what came of each in the items' order. Raises a group of what `send` raised and cancels the rest.
    """
    started_at = time.perf_counter() + starts_in_s

    def now() -> float:
        return time.perf_counter() - started_at

    async def send_when_due(item: Item) -> Outcome:
        await asyncio.sleep(max(0.0, due_at(item) - now()))
        return await send(item, now)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(send_when_due(item)) for item in items]
    return [task.result() for task in tasks]


async def send_together(send: Send, requests: Sequence[GenerationRequest]) -> Run:
    """Everything arrives at once."""

    async def send_one(request: GenerationRequest, now: Now) -> tuple[GenerationResult, Finished]:
        result = await send(request)
        return result, Finished(0.0, now(), request.duration_s * request.batch_size)

    outcomes = await play_open_loop(requests, send_one, due_at=lambda _: 0.0)
    return [result for result, _ in outcomes], [finished for _, finished in outcomes]


async def send_one_after_another(send: Send, requests: Sequence[GenerationRequest]) -> Run:
    """The next is sent when the one before ended; all count as due at the start, as behind a lock."""
    started_at = time.perf_counter()
    results, finished = [], []
    for request in requests:
        results.append(await send(request))
        finished.append(Finished(0.0, time.perf_counter() - started_at, request.duration_s * request.batch_size))
    return results, finished


async def send_in_flight(send: Send, requests: Sequence[GenerationRequest], *, num_in_flight: int) -> list[Finished]:
    """Closed loop, for throughput only: the next is sent when one of `num_in_flight` ended. Keeps no audio."""
    started_at = time.perf_counter()
    waiting, finished = iter(requests), []

    async def work() -> None:
        for request in waiting:
            sent_at = time.perf_counter() - started_at
            await send(request)
            ended_at = time.perf_counter() - started_at
            finished.append(Finished(sent_at, ended_at, request.duration_s * request.batch_size))

    async with asyncio.TaskGroup() as group:
        for _ in range(num_in_flight):
            group.create_task(work())
    return finished


@contextmanager
def another_process() -> Iterator[ProcessPoolExecutor]:
    """A fresh process to send from, or to measure in."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool
