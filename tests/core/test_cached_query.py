"""`CachedQuery`: concurrent callers share a query, and its result is cached for a time. The clock is fake."""

from __future__ import annotations

import asyncio

from stable_audio_serve.core.cached_query import CachedQuery
from tests.factories import FakeClock
from tests.patience import PATIENCE_S


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


def cached(counted: CountedQuery, clock: FakeClock) -> CachedQuery[int]:
    return CachedQuery(counted, first=0, kept_s=5.0, timeout_s=0.05, clock=clock)


async def test_concurrent_callers_share_one_query_per_second() -> None:
    clock, counted = FakeClock(), CountedQuery()
    query = cached(counted, clock)
    assert set(await asyncio.gather(*(query.answer() for _ in range(5000)))) == {1}
    clock.now += 0.9
    assert await query.answer() == 1
    clock.now += 0.2
    assert await query.answer() == 2


async def test_late_answer_is_awaited_briefly_then_the_cached_one_expires() -> None:
    clock, counted = FakeClock(), CountedQuery()
    query = cached(counted, clock)
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
    await query.wait()
    assert await query.answer() == 2


async def test_a_usable_result_is_returned_while_the_next_query_runs() -> None:
    clock, counted = FakeClock(), CountedQuery()
    query = CachedQuery(counted, first=0, fresh_s=1.0, usable_s=2.0, timeout_s=3600.0, clock=clock)
    assert await query.answer() == 1
    counted.is_free.clear()
    clock.now += 1.5
    async with asyncio.timeout(PATIENCE_S):
        assert await query.answer() == 1
    counted.is_free.set()
    await query.wait()
    assert query.result == 2
    clock.now += 2.5
    assert await query.answer() == 3


async def test_invalidate_discards_the_query_in_progress() -> None:
    clock, counted = FakeClock(), CountedQuery()
    query = cached(counted, clock)
    assert await query.answer() == 1
    clock.now += 2.0
    counted.is_free.clear()
    assert await query.answer() == 1
    query.invalidate()
    counted.is_free.set()
    assert await query.answer() == 3


async def test_query_that_raised_is_repeated() -> None:
    answers = iter((1, ValueError("a defect"), 2))

    async def query() -> int:
        answer = next(answers)
        if isinstance(answer, ValueError):
            raise answer
        return answer

    failing = CachedQuery(query, first=0, fresh_s=0.0)
    assert [await failing.answer() for _ in range(3)] == [1, 1, 2]


async def test_time_until_the_next_query_can_depend_on_the_result() -> None:
    clock, counted = FakeClock(), CountedQuery()
    query = CachedQuery(counted, first=0, fresh_s=lambda answer: 10.0 * answer, clock=clock)
    found = []
    for now in (0.0, 9.0, 10.0, 29.0, 30.0):
        clock.now = now
        found.append(await query.answer())
    assert found == [1, 1, 2, 2, 3]


async def test_late_query_says_how_long_it_has_run() -> None:
    clock, counted = FakeClock(), CountedQuery()
    query = cached(counted, clock)
    assert query.running_s == 0.0
    counted.is_free.clear()
    assert not await query.refresh()
    clock.now += 7.0
    assert query.running_s == 7.0
    assert not await query.refresh()  # does not wait again
    counted.is_free.set()
    assert await query.wait()
    assert (query.running_s, query.result) == (0.0, 1)
