"""How a workload is sent: all at once, one after another, so many at a time, or at given times (open loop).
Knows no model.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from benchmarks.metrics import Finished
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult

Send = Callable[[GenerationRequest], Awaitable[GenerationResult]]
Run = tuple[list[GenerationResult], list[Finished]]


async def send_together(send: Send, requests: Sequence[GenerationRequest]) -> Run:
    """Everything arrives at once."""
    return await send_at(send, requests, arrivals_s=[0.0] * len(requests))


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


async def send_at(send: Send, requests: Sequence[GenerationRequest], *, arrivals_s: Sequence[float]) -> Run:
    """Open loop: each request at its own time, however late the others are."""
    started_at = time.perf_counter()

    async def one(request: GenerationRequest, due_at: float) -> tuple[GenerationResult, Finished]:
        await asyncio.sleep(max(0.0, started_at + due_at - time.perf_counter()))
        result = await send(request)
        ended_at = time.perf_counter() - started_at
        return result, Finished(due_at, ended_at, request.duration_s * request.batch_size)

    outcomes = await asyncio.gather(*(one(r, due_at) for r, due_at in zip(requests, arrivals_s, strict=True)))
    return [result for result, _ in outcomes], [finished for _, finished in outcomes]


@contextmanager
def another_process() -> Iterator[ProcessPoolExecutor]:
    """A fresh process to send from, or to measure in."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool
