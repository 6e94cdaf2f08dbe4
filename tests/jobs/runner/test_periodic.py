from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from stable_audio_serve.jobs.runner.periodic import Periodic
from tests.factories import FakeClock


class Work:
    """Counts its runs, each of which lasts until it is let go or made to fail."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.num_started = 0
        self.end: asyncio.Future[None] = asyncio.Future()
        self.periodics: list[Periodic] = []

    async def run(self) -> None:
        self.num_started += 1
        self.end = asyncio.Future()
        await self.end

    def make(self, **options: Any) -> Periodic:
        periodic = Periodic(self.run, **{"pause_s": 10.0, "clock": self.clock, **options})
        self.periodics.append(periodic)
        return periodic


@pytest.fixture
async def work() -> AsyncIterator[Work]:
    work = Work()
    yield work
    for periodic in work.periodics:
        await periodic.close()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def poll(periodic: Periodic) -> None:
    periodic.start_if_due()
    await settle()


async def test_one_run_at_a_time_with_a_pause_after_each(work: Work) -> None:
    periodic = work.make()
    await poll(periodic)
    work.clock.now += 100.0
    await poll(periodic)
    assert work.num_started == 1
    work.end.set_result(None)
    await settle()
    work.clock.now += 9.9
    await poll(periodic)
    assert work.num_started == 1
    work.clock.now += 0.2
    await poll(periodic)
    assert work.num_started == 2


async def test_a_run_that_fails_is_followed_by_another(work: Work) -> None:
    periodic = work.make()
    await poll(periodic)
    work.end.set_exception(RuntimeError("a bug"))
    await settle()
    work.clock.now += 10.1
    await poll(periodic)
    assert work.num_started == 2


async def test_those_that_begin_together_drift_apart(work: Work) -> None:
    started_after = set()
    for _ in range(20):
        periodic = work.make(spread=0.5, first_in_s=10.0)
        began_at, before = work.clock.now, work.num_started
        while work.num_started == before:
            await poll(periodic)
            work.clock.now += 0.5
        started_after.add(work.clock.now - began_at)
    assert 5.0 <= min(started_after) < max(started_after) <= 15.5
    assert len(started_after) > 3


async def test_closing_cancels_the_run(work: Work) -> None:
    periodic = work.make()
    await poll(periodic)
    await periodic.close()
    assert work.end.cancelled()
