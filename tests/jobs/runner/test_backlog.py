"""How often a runner asks its store what waits, and how long it believes the answer."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from stable_audio_serve.core.pricing import WorkSize
from stable_audio_serve.jobs.runner.backlog import OLD_S, PAUSE_S, WaitingBacklog
from stable_audio_serve.jobs.store.waiting import Waiting
from tests.factories import FakeClock

ONE = {"demo": Waiting(1, WorkSize(rows=1.0))}


class Store:
    """Answers after a while, or not at all."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.num_asked = 0
        self.takes_s = 0.0
        self.is_away = False

    def ask(self) -> Mapping[str, Waiting]:
        self.num_asked += 1
        self.clock.now += self.takes_s
        if self.is_away:
            raise OSError
        return ONE


@pytest.fixture
def store() -> Store:
    return Store(FakeClock())


async def refresh_for(backlog: WaitingBacklog, store: Store, *, seconds: float) -> None:
    ends_at = store.clock.now + seconds
    while store.clock.now < ends_at:
        await backlog.refresh()
        store.clock.now += 0.1


async def test_a_quick_store_is_asked_once_a_pause_and_a_slow_one_for_a_fiftieth_of_the_time(store: Store) -> None:
    backlog = WaitingBacklog(store.ask, clock=store.clock)
    await refresh_for(backlog, store, seconds=20 * PAUSE_S)
    assert 18 <= store.num_asked <= 21
    store.num_asked, store.takes_s = 0, 0.4
    await refresh_for(backlog, store, seconds=204)
    assert 10 <= store.num_asked <= 11


async def test_an_answer_is_believed_for_a_while_after_the_store_went_away(store: Store) -> None:
    backlog = WaitingBacklog(store.ask, clock=store.clock)
    assert backlog.current() is None
    await backlog.refresh()
    store.is_away = True
    store.clock.now += PAUSE_S + OLD_S - 0.1
    with pytest.raises(OSError):
        await backlog.refresh()
    assert backlog.current() == ONE
    store.clock.now += 0.2
    assert backlog.current() is None


async def test_an_empty_queue_needs_no_question(store: Store) -> None:
    backlog = WaitingBacklog(store.ask, clock=store.clock)
    backlog.none_waits()
    assert backlog.current() == {}
    assert store.num_asked == 0
