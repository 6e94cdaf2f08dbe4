from __future__ import annotations

import asyncio
from collections.abc import Sequence

from stable_audio_serve.core.generation import Progress, Stage
from stable_audio_serve.core.progress import ProgressFeed
from tests.factories import FakeClock
from tests.patience import PATIENCE_S


def make_progress(fraction: float, stage: Stage = "denoising") -> Progress:
    return Progress(stage, fraction)


async def collect(feed: ProgressFeed) -> Sequence[Progress]:
    return [progress async for progress in feed]


async def test_every_change_of_stage_arrives_at_once_and_in_order() -> None:
    feed = ProgressFeed(3600.0)
    stages: list[Stage] = ["queued", "encoding", "denoising", "decoding", "done"]
    async with asyncio.timeout(PATIENCE_S):
        collecting = asyncio.create_task(collect(feed))
        for stage in stages:
            await asyncio.sleep(0.01)
            feed.put(make_progress(0.5, stage))
        feed.close()
        assert [progress.stage for progress in await collecting] == stages


async def test_within_a_stage_only_the_latest_arrives_once_per_interval() -> None:
    clock = FakeClock()
    feed = ProgressFeed(0.01, clock=clock)
    received: dict[float, Progress] = {}

    async def receive() -> None:
        async for progress in feed:
            received[progress.fraction] = progress

    async def has_received(*fractions: float) -> None:
        while tuple(received) != fractions:  # noqa: ASYNC110 - a feed has no event for received progress
            await asyncio.sleep(0.001)

    async with asyncio.timeout(PATIENCE_S):
        receiving = asyncio.create_task(receive())
        feed.put(make_progress(0.1))
        await has_received(0.1)
        for fraction in (0.2, 0.3, 0.4):
            feed.put(make_progress(fraction))
            # Several polls happen, but the fake clock stands still, so the interval does not end.
            await asyncio.sleep(0.02)
        assert tuple(received) == (0.1,)
        clock.now += 0.02
        await has_received(0.1, 0.4)  # the interval has ended, so the newest progress arrives
        feed.close()
        await receiving
    assert tuple(received) == (0.1, 0.4)


async def test_pending_progress_is_delivered_at_the_end_without_waiting() -> None:
    feed = ProgressFeed(3600.0)
    for progress in (make_progress(0.1), make_progress(0.2), make_progress(0.3, "decoding")):
        feed.put(progress)
    feed.close()
    async with asyncio.timeout(PATIENCE_S):
        assert await collect(feed) == [make_progress(0.2), make_progress(0.3, "decoding")]


async def test_a_feed_without_progress_ends() -> None:
    feed = ProgressFeed(1.0)
    feed.close()
    async with asyncio.timeout(PATIENCE_S):
        assert await collect(feed) == []
