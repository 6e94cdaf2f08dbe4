"""`CachedQuery`: concurrent callers share a query, and its result is cached for a time. The clock is fake."""

from __future__ import annotations

import asyncio

import pytest

from stable_audio_serve.serving import operations as module
from stable_audio_serve.serving.operations import CachedQuery
from tests.factories import FakeClock


class CountedQuery:
    """A query whose result is the number of its calls so far. A call waits until `is_free` is set."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.is_free = asyncio.Event()
        self.is_free.set()

    async def __call__(self) -> int:
        self.num_calls += 1
        answer = self.num_calls
        await self.is_free.wait()
        return answer


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TIMEOUT_S", 0.05)


async def test_concurrent_callers_share_one_query_per_second() -> None:
    clock, counted = FakeClock(), CountedQuery()
    query = CachedQuery(counted, first=0, clock=clock)
    assert set(await asyncio.gather(*(query.answer() for _ in range(5000)))) == {1}
    clock.now += 0.9
    assert await query.answer() == 1
    clock.now += 0.2
    assert await query.answer() == 2


async def test_late_answer_is_awaited_briefly_then_the_cached_one_expires() -> None:
    clock, counted = FakeClock(), CountedQuery()
    query = CachedQuery(counted, first=0, clock=clock)
    counted.is_free.clear()
    assert await query.answer() == 0
    counted.is_free.set()
    assert await query.answer() == 1
    counted.is_free.clear()
    clock.now += 4.0
    assert await query.answer() == 1
    clock.now += 4.0
    assert await query.answer() == 0
    counted.is_free.set()
    assert await query.answer() == 2


async def test_invalidate_discards_the_query_in_progress() -> None:
    clock, counted = FakeClock(), CountedQuery()
    query = CachedQuery(counted, first=0, clock=clock)
    assert await query.answer() == 1
    clock.now += 2.0
    counted.is_free.clear()
    assert await query.answer() == 1
    query.invalidate()
    counted.is_free.set()
    assert await query.answer() == 3
