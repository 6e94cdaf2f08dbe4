"""Limits over several processes that share a database: each of them is an `Accounts` with connections of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from stable_audio_serve.api.middleware.key_accounts import Accounts
from stable_audio_serve.core.errors import (
    DeadlineExceededError,
    ForbiddenError,
    InvalidRequestError,
    OverloadedError,
    QuotaError,
    StartTimeoutError,
)
from stable_audio_serve.core.keys import ANYBODY, ApiKey, hash_key, parse_key
from stable_audio_serve.core.metrics import NullMetrics
from stable_audio_serve.jobs.store.account import Visit
from stable_audio_serve.jobs.store.ledger import Ledger, Settled
from tests.databases import PostgresServer
from tests.jobs.stores import open_database, postgres_with_tables, store_url
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.server

__all__ = ["postgres_with_tables", "store_url"]


def make_key(words: str, name: str = "alice") -> ApiKey:
    return parse_key(f"{name}:{hash_key(name)} {words}")


@pytest.fixture
async def pair(store_url: str) -> AsyncIterator[tuple[Accounts, Accounts]]:
    """Two processes that answer requests."""
    open_database(store_url).prepare()
    pair = Accounts(open_database(store_url), num_processes=2), Accounts(open_database(store_url), num_processes=2)
    yield pair
    await asyncio.gather(*(accounts.close() for accounts in pair))


async def admit(accounts: Accounts, key: ApiKey, audio_s: float = 1.0) -> float | None:
    """Returns the Retry-After of a refusal, None for a request that was admitted and took no time."""
    try:
        async with accounts.admitted(key, audio_s=audio_s, takes_place=True):
            return None
    except QuotaError as error:
        return error.retry_after_s or 0.0


async def test_hammered_through_two_processes_exactly_the_limit_is_admitted(pair: tuple[Accounts, Accounts]) -> None:
    key = make_key("audio-seconds-per-minute=100")
    began_at = asyncio.get_running_loop().time()

    async def hammer(accounts: Accounts) -> list[float | None]:
        return [await admit(accounts, key, 1.0) for _ in range(60)]

    found = [each for some in await asyncio.gather(*(hammer(one) for one in pair * 5)) for each in some]
    taken_s = asyncio.get_running_loop().time() - began_at
    assert found.count(None) == 100 or taken_s > 59
    waits = [each for each in found if each is not None]
    assert all(59 - taken_s <= wait <= 61 for wait in waits)


async def test_places_are_never_more_than_the_limit_over_both(pair: tuple[Accounts, Accounts]) -> None:
    key, now, most = make_key("concurrency=3"), 0, 0

    async def use(accounts: Accounts) -> int:
        nonlocal now, most
        try:
            async with accounts.admitted(key, audio_s=1, takes_place=True):
                now += 1
                most = max(most, now)
                await asyncio.sleep(0.01)
                now -= 1
                return 1
        except QuotaError:
            await asyncio.sleep(0.005)
            return 0

    async def repeat(accounts: Accounts) -> int:
        return sum([await use(accounts) for _ in range(30)])

    counts = await asyncio.gather(*(repeat(one) for one in pair * 4))
    assert most == 3
    assert sum(counts) >= 30  # places come free again


async def test_a_client_that_waits_for_each_answer_is_never_refused(pair: tuple[Accounts, Accounts]) -> None:
    key = make_key("concurrency=1")
    assert [await admit(pair[number % 2], key) for number in range(40)] == [None] * 40


async def test_what_was_refused_later_can_be_used_again(pair: tuple[Accounts, Accounts]) -> None:
    key = make_key("audio-seconds-per-minute=10")
    for error in (OverloadedError("full"), StartTimeoutError("late"), InvalidRequestError("bad"), RuntimeError("bug")):
        with pytest.raises(type(error)):
            async with pair[0].admitted(key, audio_s=10, takes_place=True):
                raise error
    async with pair[0].admitted(key, audio_s=9, takes_place=False) as admission:
        admission.give_back()
    with pytest.raises(DeadlineExceededError):
        async with pair[0].admitted(key, audio_s=10, takes_place=True):
            raise DeadlineExceededError("its own time")
    assert await admit(pair[0], key) is not None
    assert await admit(pair[1], key) is not None


async def test_a_client_that_goes_away_leaves_its_place_and_pays(pair: tuple[Accounts, Accounts]) -> None:
    key = make_key("concurrency=1 audio-seconds-per-minute=10")
    entered = asyncio.Event()

    async def stay() -> None:
        async with pair[0].admitted(key, audio_s=4, takes_place=True):
            entered.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(stay())
    await entered.wait()
    assert await admit(pair[1], key) is not None
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await pair[0].close()  # by then all is told
    assert await admit(pair[1], key, 6) is None
    assert await admit(pair[1], key, 1) is not None


async def test_more_than_a_minute_holds_is_forbidden_and_names_the_limit(pair: tuple[Accounts, Accounts]) -> None:
    with pytest.raises(ForbiddenError, match="audio-seconds-per-minute=10"):
        await admit(pair[0], make_key("audio-seconds-per-minute=10"), 10.5)


async def test_names_and_keys_without_limits_have_accounts_of_their_own(tmp_path: Path) -> None:
    accounts = Accounts(open_database(f"sqlite:///{tmp_path / 'jobs.db'}"), num_processes=1)
    for key in (ANYBODY, make_key(""), make_key("", "bob")):
        assert [await admit(accounts, key, 1e9) for _ in range(10)] == [None] * 10
    assert not (tmp_path / "jobs.db").exists()  # nothing was asked
    limited = [make_key("audio-seconds-per-minute=1", name) for name in ("alice", "bob")]
    assert [await admit(accounts, key) for key in limited] == [None, None]
    await accounts.close()


@pytest.mark.server
@pytest.mark.slow
async def test_while_the_database_is_away_each_process_keeps_its_share(postgres: PostgresServer) -> None:
    url = postgres.create_database()
    open_database(url).prepare()
    accounts = Accounts(open_database(url), num_processes=2)
    key = make_key("audio-seconds-per-minute=20 concurrency=4")
    assert await admit(accounts, key, 2) is None
    postgres.stop()
    try:
        found = [await admit(accounts, key) for _ in range(20)]
        assert found.count(None) == 8  # half of 20, and 2 were used before
        other = make_key("concurrency=4", "bob")
        one, two = (accounts.admitted(other, audio_s=1, takes_place=True) for _ in range(2))
        async with one, two:
            assert await admit(accounts, other) is not None
    finally:
        postgres.start()
    second = Accounts(open_database(url), num_processes=2)
    for _ in range(600):  # until the first one has told
        (settled,) = Ledger(open_database(url)).settle("looker", [_empty_visit(key)], lease_s=15)
        if sum(settled.account.charges.values()) == 10:
            break
        await asyncio.sleep(0.1)
    assert await admit(second, key, 10) is None
    assert await admit(second, key, 1) is not None
    await asyncio.gather(accounts.close(), second.close())
    postgres.drop_database(url)


def _empty_visit(key: ApiKey):  # type: ignore[no-untyped-def]

    return Visit(key.client, key.limits)


class Gauges(NullMetrics):
    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def gauge(self, name: str, value: float, **labels: str) -> None:
        self.values[name] = value


async def test_a_database_that_is_slow_is_waited_for_and_no_more_than_the_limit_is_admitted(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_database(store_url).prepare()
    servers = [Accounts(open_database(store_url), num_processes=1) for _ in range(2)]
    key, settle = make_key("audio-seconds-per-minute=20"), Ledger.settle

    def settle_slowly(*args: object, **options: object) -> list[Settled]:
        time.sleep(2.5)
        return settle(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Ledger, "settle", settle_slowly)
    found = await asyncio.gather(*(admit(servers[number % 2], key) for number in range(60)))
    assert found.count(None) == 20
    await asyncio.gather(*(accounts.close() for accounts in servers))


async def test_a_database_that_hangs_delays_one_request_and_what_it_grants_late_is_returned(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_database(store_url).prepare()
    sink = Gauges()
    accounts = Accounts(open_database(store_url), num_processes=1, patience_s=1, metrics=sink)
    key, goes_on, settle = make_key("audio-seconds-per-minute=100"), threading.Event(), Ledger.settle

    def hang(*args: object, **options: object) -> list[Settled]:
        goes_on.wait(PATIENCE_S)
        return settle(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Ledger, "settle", hang)
    try:
        assert [await admit(accounts, key) for _ in range(30)] == [None] * 30
        assert sink.values["key_limits_alone"] == 1.0
    finally:
        goes_on.set()
    async with asyncio.timeout(PATIENCE_S):
        while sink.values["key_limits_alone"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await accounts.close()
    (settled,) = settle(Ledger(open_database(store_url)), "looker", [_empty_visit(key)], lease_s=15)
    assert sum(settled.account.charges.values()) == 30


async def test_metrics_name_a_bounded_number_of_clients(tmp_path: Path) -> None:
    class Sink(NullMetrics):
        def __init__(self) -> None:
            self.names: set[str] = set()

        def increment(self, name: str, value: float = 1.0, **labels: str) -> None:
            super().increment(name, value, **labels)
            self.names.add(labels["key"])

    sink = Sink()
    accounts = Accounts(open_database(f"sqlite:///{tmp_path / 'jobs.db'}"), num_processes=1, metrics=sink)
    for number in range(1000):
        await admit(accounts, make_key("", f"client-{number}"))
    await admit(accounts, parse_key(hash_key("secret")))
    assert len(sink.names) == 201
    assert "other" in sink.names
    assert not any(hash_key("secret").startswith(name) for name in sink.names)
    await accounts.close()
