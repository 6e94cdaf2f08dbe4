from __future__ import annotations

import asyncio

import pytest

from stable_audio_serve.jobs.runner.execution import ByteBudget
from tests.patience import PATIENCE_S


async def take(budget: ByteBudget, num_bytes: int, taken: list[int], *, until: asyncio.Event) -> None:
    async with budget.hold(num_bytes):
        taken.append(num_bytes)
        await until.wait()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_holders_that_fit_run_together_and_others_wait_in_order() -> None:
    budget, taken, done = ByteBudget(100), list[int](), asyncio.Event()
    tasks = []
    for num_bytes in (60, 40, 50, 1):
        tasks.append(asyncio.create_task(take(budget, num_bytes, taken, until=done)))
        await settle()
    assert taken == [60, 40]  # 50 waits for room, and 1 waits because it came after 50
    done.set()
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*tasks)
    assert taken == [60, 40, 50, 1]


async def test_single_holder_may_exceed_the_budget() -> None:
    budget, taken, done = ByteBudget(100), list[int](), asyncio.Event()
    tasks = [asyncio.create_task(take(budget, num_bytes, taken, until=done)) for num_bytes in (500, 1)]
    await settle()
    assert taken == [500]
    done.set()
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*tasks)


async def test_cancelled_or_failed_holder_releases_its_bytes() -> None:
    budget = ByteBudget(100)
    with pytest.raises(RuntimeError):
        async with budget.hold(100):
            raise RuntimeError("a bug")
    async with budget.hold(100):
        waiting = asyncio.create_task(take(budget, 100, [], until=asyncio.Event()))
        await settle()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    async with asyncio.timeout(PATIENCE_S), budget.hold(100):
        pass
