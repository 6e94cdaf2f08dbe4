"""Accounts in a database: each limit is kept however many processes ask for the rest of it at once."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ProcessPoolExecutor

import pytest

from stable_audio_serve.core.ids import ClientId
from stable_audio_serve.core.keys import KeyLimits
from stable_audio_serve.jobs.store.account import Ask, Charge, Visit
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.ledger import Ledger
from tests.jobs.stores import Wall, database, open_database, postgres_with_tables, wall
from tests.jobs.stores import contract_store_url as store_url
from tests.patience import PATIENCE_S

__all__ = ["database", "postgres_with_tables", "store_url", "wall"]

ALICE, BOB = ClientId("alice"), ClientId("bob")


def visit(client: ClientId = ALICE, *, rate: float | None = None, places: int | None = None, num: int = 1) -> Visit:
    return Visit(client, KeyLimits(rate, places), asks=[Ask(1.0, takes_place=True)] * num)


def count(ledger: Ledger, holder: str, *visits: Visit) -> list[int]:
    """How many asks of each visit were admitted."""
    settled = ledger.settle(holder, visits, lease_s=15)
    return [sum(isinstance(outcome, Charge) for outcome in one.outcomes) for one in settled]


def test_holders_share_an_account_and_clients_have_their_own(database: Database, wall: Wall) -> None:
    one, two = Ledger(database), Ledger(database)
    assert count(one, "a", visit(rate=10, num=7), visit(BOB, rate=5, num=7)) == [7, 5]
    assert count(two, "b", visit(BOB, rate=5), visit(rate=10, num=7)) == [0, 3]
    wall.now += 59
    assert count(one, "a", visit(rate=10)) == [0]
    wall.now += 1
    assert count(one, "a", visit(rate=10, num=20)) == [10]


def test_a_holder_that_falls_silent_gives_its_places_back(database: Database, wall: Wall) -> None:
    ledger = Ledger(database)
    assert count(ledger, "a", visit(places=3, num=5)) == [3]
    wall.now += 14
    assert count(ledger, "b", visit(places=3)) == [0]
    wall.now += 1.1
    assert count(ledger, "b", visit(places=3, num=5)) == [3]


def test_the_account_and_its_time_come_back(database: Database, wall: Wall) -> None:
    (settled,) = Ledger(database).settle("a", [visit(rate=10, places=3, num=4)], lease_s=15)
    assert settled.now == pytest.approx(wall.now, abs=0.01)
    assert settled.account.places == {"a": (3, pytest.approx(wall.now + 15, abs=0.01))}
    assert sum(settled.account.charges.values()) == 3


def _hammer(url: str, holder: str, times: int) -> int:
    """In another process: ask as fast as it goes, until refused so many times. Returns how much was admitted."""
    ledger = Ledger(open_database(url))
    num_admitted = num_refused = 0
    while num_refused < times:
        admitted = sum(count(ledger, holder, visit(rate=50), visit(BOB, rate=50)))
        num_admitted, num_refused = num_admitted + admitted, num_refused + (not admitted)
    return num_admitted


@pytest.mark.server
def test_processes_that_race_for_the_last_second_get_it_once(store_url: str, processes: ProcessPoolExecutor) -> None:
    open_database(store_url).prepare()
    futures: list[Future[int]] = [processes.submit(_hammer, store_url, f"{number}", 20) for number in range(3)]
    assert sum(future.result() for future in futures) == 100


def test_many_clients_in_any_order_never_wait_for_each_other_in_a_circle(store_url: str) -> None:
    names = [ClientId(f"client-{number}") for number in range(20)]
    counts: list[int] = []

    def ask(holder: str, names: list[ClientId]) -> None:
        ledger = Ledger(open_database(store_url))
        counts.extend(sum(count(ledger, holder, *[visit(name, rate=5) for name in names])) for _ in range(10))

    open_database(store_url).prepare()
    threads = [threading.Thread(target=ask, args=(f"{sign}", names[::sign])) for sign in (1, -1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert (len(counts), sum(counts)) == (20, 100)
