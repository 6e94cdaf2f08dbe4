"""The store counts what clients with limited keys use. Concurrent processes together never exceed a limit."""

from __future__ import annotations

import random
import secrets
import threading
from typing import Any

import pytest
import sqlalchemy as sa

from stable_audio_serve.core.ids import ClientId
from stable_audio_serve.core.keys import KeyLimits
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.key_uses import KeyUses, Use
from stable_audio_serve.jobs.store.tables import KEY_USES
from tests.jobs.stores import Wall, database, open_database, postgres_with_tables, wall
from tests.jobs.stores import contract_store_url as store_url
from tests.patience import PATIENCE_S

__all__ = ["database", "postgres_with_tables", "store_url", "wall"]

ALICE, BOB = ClientId("alice"), ClientId("bob")


def make_use(
    audio_s: float = 1.0,
    *,
    client: ClientId = ALICE,
    rate: float | None = None,
    places: int | None = None,
    busy_retry_s: float = 1.0,
) -> Use:
    return Use(
        id=secrets.token_hex(8),
        client=client,
        limits=KeyLimits(rate, places),
        audio_s=audio_s,
        has_place=places is not None,
        busy_retry_s=busy_retry_s,
    )


def admit(uses: KeyUses, audio_s: float = 1.0, **options: Any) -> float | None:
    """Admit a request for `audio_s` seconds. Return None if it is admitted, else the error's `retry_after_s`."""
    refusal = uses.admit(make_use(audio_s, **options))
    return None if refusal is None else refusal.retry_after_s


def count(uses: KeyUses, num: int, **options: Any) -> int:
    return [admit(uses, **options) for _ in range(num)].count(None)


def test_repeated_call_counts_once(database: Database) -> None:
    uses, use = KeyUses(database), make_use(3.0, rate=5.0)
    assert [uses.admit(use), uses.admit(use)] == [None, None]
    assert admit(uses, 2.0, rate=5.0) is None
    assert admit(uses, 1.0, rate=5.0) is not None


def test_processes_share_a_limit_and_each_client_has_its_own(database: Database, wall: Wall) -> None:
    one, two = KeyUses(database), KeyUses(database)
    assert (count(one, 7, rate=10), count(one, 7, rate=5, client=BOB)) == (7, 5)
    assert (count(two, 1, rate=5, client=BOB), count(two, 7, rate=10)) == (0, 3)
    wall.now += 59
    assert count(one, 1, rate=10) == 0
    wall.now += 1
    assert count(one, 20, rate=10) == 10


def test_retry_time_is_when_enough_uses_are_a_minute_old(database: Database, wall: Wall) -> None:
    uses = KeyUses(database)
    for audio_s in (200, 300, 100):
        assert admit(uses, audio_s, rate=600) is None
        wall.now += 10
    refusals = [uses.find_full(make_use(audio_s, rate=600)) for audio_s in (200, 201, 500, 501, 600)]
    assert [refusal and refusal.retry_after_s for refusal in refusals] == [30, 40, 40, 50, 50]
    wall.now += 29.9
    assert admit(uses, 200, rate=600) == pytest.approx(0.1)
    wall.now += 0.1
    assert admit(uses, 200, rate=600) is None


def test_refunded_audio_can_be_used_again(database: Database) -> None:
    uses, use = KeyUses(database), make_use(10, rate=10)
    for _ in range(3):
        assert uses.admit(use) is None
        uses.end(use, counts=False)
    assert uses.admit(use) is None
    uses.end(use, counts=True)
    assert admit(uses, rate=10) is not None


def test_place_is_free_when_its_request_ends(database: Database) -> None:
    uses, use = KeyUses(database), make_use(places=2, rate=100)
    assert uses.admit(use) is None
    assert count(uses, 3, places=2, rate=100) == 1
    assert admit(uses, places=2, busy_retry_s=7.0) == 7
    uses.end(use, counts=True)
    assert count(uses, 3, places=2, rate=100) == 1


def test_places_without_renewal_expire_after_15_seconds(database: Database, wall: Wall) -> None:
    uses, use = KeyUses(database), make_use(places=3)
    assert uses.admit(use) is None
    assert count(uses, 5, places=3) == 2
    wall.now += 10
    uses.renew([use.id])
    wall.now += 4
    assert count(uses, 1, places=3) == 0
    wall.now += 1.1
    assert count(uses, 5, places=3) == 2


def test_clock_set_back_locks_no_client_out(database: Database, wall: Wall) -> None:
    uses = KeyUses(database)
    assert admit(uses, 10, rate=10, places=1) is None
    wall.now -= 86_400
    assert admit(uses, 10, rate=10, places=1) is None
    assert admit(uses, 10, rate=10) == 60


def test_no_minute_exceeds_the_limit_and_load_uses_nearly_all(database: Database, wall: Wall) -> None:
    chance, uses = random.Random(1), KeyUses(database)
    admitted: list[tuple[float, float]] = []
    began_at = wall.now
    while wall.now < began_at + 180:
        wall.now += chance.expovariate(2)
        audio_s = chance.choice([0.5, 1, 7.3, 47])
        if admit(uses, audio_s, rate=600) is None:
            admitted.append((wall.now, audio_s))
    for begin, _ in admitted:
        assert sum(audio_s for at, audio_s in admitted if begin <= at < begin + 60) <= 600 + 1e-6
    assert 0.95 * 3 * 600 < sum(audio_s for _, audio_s in admitted) <= 3 * 600


def test_expired_rows_of_a_client_are_deleted(database: Database, wall: Wall) -> None:
    uses = KeyUses(database)
    for _ in range(90):
        assert admit(uses, rate=1e8, places=1000) is None
        wall.now += 1
    with database.reading() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(KEY_USES)).scalar_one() == 60


def test_concurrent_threads_never_exceed_the_places(store_url: str, wall: Wall) -> None:
    open_database(store_url).prepare()
    counts: list[int] = []
    start = threading.Barrier(8)

    def ask() -> None:
        uses = KeyUses(open_database(store_url, wall))
        start.wait(PATIENCE_S)
        counts.append(count(uses, 5, places=7))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert (len(counts), sum(counts)) == (8, 7)
