"""Requests with the priority "batch" hardly delay interactive requests, and never make the engine refuse them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from stable_audio_serve.core.errors import OverloadedError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, Progress
from stable_audio_serve.engine import Engine, EngineOptions
from tests.factories import FakeClock, ToyModel, make_request
from tests.parameters import slow
from tests.patience import PATIENCE_S

_STEPS = 16
_CALL_S = 0.01


class Device:
    """A simulated device: a call takes 10 ms for one row and 5 ms for each further row.

    After `hold`, the engine's thread stops before the next denoiser call until `release`.
    """

    def __init__(self) -> None:
        self.clock = FakeClock()
        self._reached, self._open = threading.Event(), threading.Event()
        self._open.set()

    def __call__(self, name: str, items: Sequence[object]) -> None:
        if name == "denoise" and not self._open.is_set():
            self._reached.set()
            assert self._open.wait(PATIENCE_S)
        self.clock.now += _CALL_S * (1 + len(items)) / 2

    def hold(self) -> None:
        self._open.clear()

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, PATIENCE_S)

    def release(self) -> None:
        self._open.set()


@asynccontextmanager
async def make_engine(device: Device, **fields: object) -> AsyncIterator[Engine]:
    options = replace(EngineOptions(torch_threads=1), **fields)  # type: ignore[arg-type]
    async with Engine(ToyModel(on_call=device), options, clock=device.clock) as engine:
        yield engine


def make_batch(seed: int, *, steps: int = _STEPS) -> GenerationRequest:
    return make_request(seed=seed, priority="batch", duration_s=1.0, steps=steps)


async def hand_over(engine: Engine, requests: Sequence[GenerationRequest]) -> list[asyncio.Task[GenerationResult]]:
    """Submit the requests one after another, and wait until all are accepted. Returns their tasks."""
    tasks = []
    for request in requests:
        backlog_ms = engine.backlog_ms
        tasks.append(asyncio.create_task(engine.generate(request)))
        async with asyncio.timeout(PATIENCE_S):
            while engine.backlog_ms == backlog_ms:  # noqa: ASYNC110 - the planner's threads change it
                await asyncio.sleep(0.002)
    return tasks


async def cancel(tasks: Sequence[asyncio.Task[GenerationResult]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("mode", ["strict", slow("fast")])
async def test_thirty_batch_jobs_hardly_delay_an_interactive_request(mode: str) -> None:
    device = Device()
    async with make_engine(device, mode=mode, max_rows=8) as engine:
        request = make_request(duration_s=1.0, steps=_STEPS)
        alone = (await engine.generate(request)).timings
        device.hold()
        jobs = await hand_over(engine, [make_batch(seed) for seed in range(30)])
        await device.reached()  # a step of the batch requests is about to run
        (interactive,) = await hand_over(engine, [request])
        device.release()
        timings = (await interactive).timings
        await cancel(jobs)
    assert timings.total_ms <= 1.5 * alone.total_ms + 2 * 1000 * _CALL_S


async def test_batch_rows_progress_under_continuous_interactive_load() -> None:
    device = Device()
    async with make_engine(device, mode="strict") as engine:
        num_requests = 0
        is_over = asyncio.Event()

        async def keep_asking() -> None:
            nonlocal num_requests
            while not is_over.is_set():
                await engine.generate(make_request(duration_s=1.0, steps=_STEPS))
                num_requests += 1

        crowd = [asyncio.create_task(keep_asking()) for _ in range(4)]
        await engine.generate(make_batch(1))
        is_over.set()
        await asyncio.gather(*crowd)
    assert num_requests >= 4


async def test_batch_work_does_not_fill_the_interactive_queue() -> None:
    device = Device()
    async with make_engine(device, max_queue_s=0.001) as engine:
        device.hold()
        jobs = await hand_over(engine, [make_batch(1, steps=200)])
        await device.reached()
        with pytest.raises(OverloadedError) as refusal:
            await engine.generate(make_batch(2))
        assert refusal.value.retry_after_s is not None
        assert refusal.value.retry_after_s == pytest.approx(max(0.1, engine.backlog_ms / 1000 - 0.001), rel=0.2)
        jobs += await hand_over(engine, [make_request(steps=200)])
        for request in (make_batch(3), make_request()):
            with pytest.raises(OverloadedError):
                await engine.generate(request)
        device.release()
        await cancel(jobs)


async def test_planning_of_batch_requests_does_not_delay_interactive_ones() -> None:
    released = threading.Event()

    class SlowPlanner(ToyModel):
        def plan(self, request: GenerationRequest, *, frames: int | None = None):  # type: ignore[no-untyped-def]
            assert request.priority == "interactive" or released.wait(PATIENCE_S)
            return super().plan(request, frames=frames)

    options = EngineOptions(max_planning=2, torch_threads=1, warmup_budget_s=0.0)
    async with Engine(SlowPlanner(), options) as engine:
        jobs = [asyncio.create_task(engine.generate(make_batch(seed))) for seed in range(2)]
        assert (await engine.generate(make_request(seed=9))).seeds == (9,)
        released.set()
        await asyncio.gather(*jobs)


async def test_positions_count_rows_of_higher_priority_first() -> None:
    device, reports = Device(), dict[str, list[Progress]]()
    async with make_engine(device, mode="strict") as engine:
        device.hold()
        tasks = await hand_over(engine, [make_batch(1)])
        await device.reached()
        for name, request in (("batch", make_batch(2)), ("interactive", make_request(steps=_STEPS))):
            backlog_ms, reports[name] = engine.backlog_ms, []
            tasks.append(asyncio.create_task(engine.generate(request, reports[name].append)))
            async with asyncio.timeout(PATIENCE_S):
                while engine.backlog_ms == backlog_ms:  # noqa: ASYNC110
                    await asyncio.sleep(0.002)
        device.release()
        await asyncio.gather(*tasks)
    assert [reports[name][0].queue_position for name in ("interactive", "batch")] == [0, 2]
