"""Limits of API keys that several server processes enforce together through one database.

Each process is represented by a `KeyLimiter` with its own database connections.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from stable_audio_serve.api.middleware import key_limits
from stable_audio_serve.api.middleware.key_limits import KeyLimiter
from stable_audio_serve.core.errors import (
    DeadlineExceededError,
    ForbiddenError,
    InvalidRequestError,
    OverloadedError,
    QuotaError,
    StartTimeoutError,
)
from stable_audio_serve.core.keys import ANYBODY, ApiKey, hash_key, parse_key
from stable_audio_serve.jobs.store import key_uses
from stable_audio_serve.jobs.store.key_uses import KeyUses, Use
from tests.databases import PostgresServer
from tests.jobs.stores import open_database, postgres_with_tables, store_url
from tests.patience import PATIENCE_S
from tests.recorded_metrics import RecordedMetrics

pytestmark = pytest.mark.server

__all__ = ["postgres_with_tables", "store_url"]


def make_key(words: str, name: str = "alice") -> ApiKey:
    return parse_key(f"{name}:{hash_key(name)} {words}")


@pytest.fixture
async def pair(store_url: str) -> AsyncIterator[tuple[KeyLimiter, KeyLimiter]]:
    """Yield two limiters that share a database, like the limiters of two server processes."""
    open_database(store_url).prepare()
    pair = KeyLimiter(open_database(store_url)), KeyLimiter(open_database(store_url))
    yield pair
    await asyncio.gather(*(limiter.close() for limiter in pair))


async def admit(limiter: KeyLimiter, key: ApiKey, audio_s: float = 1.0) -> float | None:
    """Start and end a request for `audio_s` seconds of audio.

    Returns None if it is admitted, otherwise the seconds after which to retry.
    """
    try:
        async with limiter.admitted(key, audio_s=audio_s, takes_place=True):
            return None
    except QuotaError as error:
        return error.retry_after_s or 0.0


async def test_two_processes_admit_exactly_the_limit(
    pair: tuple[KeyLimiter, KeyLimiter],
) -> None:
    key = make_key("audio-seconds-per-minute=100")
    began_at = asyncio.get_running_loop().time()

    async def hammer(limiter: KeyLimiter) -> list[float | None]:
        return [await admit(limiter, key, 1.0) for _ in range(60)]

    found = [each for some in await asyncio.gather(*(hammer(one) for one in pair * 5)) for each in some]
    taken_s = asyncio.get_running_loop().time() - began_at
    assert found.count(None) == 100 or taken_s > 59
    waits = [each for each in found if each is not None]
    assert all(59 - taken_s <= wait <= 61 for wait in waits)


async def test_concurrency_limit_holds_over_two_processes(pair: tuple[KeyLimiter, KeyLimiter]) -> None:
    key, now, most = make_key("concurrency=3"), 0, 0

    async def use(limiter: KeyLimiter) -> int:
        nonlocal now, most
        try:
            async with limiter.admitted(key, audio_s=1, takes_place=True):
                now += 1
                most = max(most, now)
                await asyncio.sleep(0.01)
                now -= 1
                return 1
        except QuotaError:
            await asyncio.sleep(0.005)
            return 0

    async def repeat(limiter: KeyLimiter) -> int:
        return sum([await use(limiter) for _ in range(30)])

    counts = await asyncio.gather(*(repeat(one) for one in pair * 4))
    assert most == 3
    assert sum(counts) >= 30  # more than may run at once, because ended requests no longer count


async def test_sequential_requests_of_a_client_are_never_refused(pair: tuple[KeyLimiter, KeyLimiter]) -> None:
    key = make_key("concurrency=1")
    assert [await admit(pair[number % 2], key) for number in range(40)] == [None] * 40


async def test_failed_requests_are_refunded_but_timeouts_are_charged(pair: tuple[KeyLimiter, KeyLimiter]) -> None:
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


async def test_cancelled_request_frees_its_place_and_is_charged(pair: tuple[KeyLimiter, KeyLimiter]) -> None:
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
    await pair[0].close()  # returns when the database no longer counts the request as running
    assert await admit(pair[1], key, 6) is None
    assert await admit(pair[1], key, 1) is not None


async def test_request_larger_than_the_whole_limit_is_forbidden(pair: tuple[KeyLimiter, KeyLimiter]) -> None:
    with pytest.raises(ForbiddenError, match="audio-seconds-per-minute=10"):
        await admit(pair[0], make_key("audio-seconds-per-minute=10"), 10.5)


async def test_keys_without_limits_are_admitted_and_clients_have_own_limits(tmp_path: Path) -> None:
    limiter = KeyLimiter(open_database(f"sqlite:///{tmp_path / 'jobs.db'}"))
    for key in (ANYBODY, make_key(""), make_key("", "bob")):
        assert [await admit(limiter, key, 1e9) for _ in range(10)] == [None] * 10
    assert not (tmp_path / "jobs.db").exists()  # keys without limits need no database
    limited = [make_key("audio-seconds-per-minute=1", name) for name in ("alice", "bob")]
    assert [await admit(limiter, key) for key in limited] == [None, None]
    await limiter.close()


@pytest.mark.slow
async def test_each_process_keeps_the_limits_during_a_database_outage(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_limits, "_RENEW_S", 0.5)
    url, sink = postgres.create_database(), RecordedMetrics()
    open_database(url).prepare()
    limiter = KeyLimiter(open_database(url), metrics=sink)
    key, other = make_key("audio-seconds-per-minute=20 concurrency=4"), make_key("concurrency=1", "bob")
    async with limiter.admitted(other, audio_s=1, takes_place=True):
        postgres.stop()
        try:
            found = [await admit(limiter, key) for _ in range(30)]
            assert found.count(None) == 20
            assert sink.gauges["key_limits_alone"] == 1.0
            async with limiter.admitted(make_key("concurrency=1", "carol"), audio_s=1, takes_place=True):
                assert await admit(limiter, make_key("concurrency=1", "carol")) is not None
        finally:
            postgres.start()
        async with asyncio.timeout(PATIENCE_S):
            while sink.gauges["key_limits_alone"]:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert await admit(limiter, other) is not None  # the database still counts the ended request as running
    assert await admit(limiter, key, 20) is None  # requests admitted during the outage do not count
    await limiter.close()
    postgres.drop_database(url)


async def test_limit_holds_with_a_slow_database(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_database(store_url).prepare()
    limiters = [KeyLimiter(open_database(store_url)) for _ in range(2)]
    key, admit_use = make_key("audio-seconds-per-minute=2"), KeyUses.admit

    def admit_slowly(uses: KeyUses, use: Use) -> QuotaError | None:
        time.sleep(1.5)
        return admit_use(uses, use)

    monkeypatch.setattr(KeyUses, "admit", admit_slowly)
    found = await asyncio.gather(*(admit(limiters[number % 2], key) for number in range(4)))
    assert found.count(None) == 2
    await asyncio.gather(*(limiter.close() for limiter in limiters))


async def test_a_database_that_hangs_delays_requests_once(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_database(store_url).prepare()
    monkeypatch.setattr(key_limits, "_RENEW_S", 0.1)
    sink = RecordedMetrics()
    limiter = KeyLimiter(open_database(store_url), patience_s=1, metrics=sink)
    key, resumed, admit_use = make_key("audio-seconds-per-minute=20"), threading.Event(), KeyUses.admit

    def hang(uses: KeyUses, use: Use) -> QuotaError | None:
        resumed.wait(PATIENCE_S)
        return admit_use(uses, use)

    monkeypatch.setattr(KeyUses, "admit", hang)
    began_at = time.monotonic()
    try:
        found = [*await asyncio.gather(*(admit(limiter, key) for _ in range(10)))]
        found += [await admit(limiter, key) for _ in range(20)]
        assert found.count(None) == 20
        assert sink.gauges["key_limits_alone"] == 1.0
        assert time.monotonic() - began_at < 5
    finally:
        resumed.set()
    async with asyncio.timeout(PATIENCE_S):
        while sink.gauges["key_limits_alone"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert await admit(limiter, key, 19) is None  # one request of 1 s was counted after the hang
    assert await admit(limiter, key, 1) is not None
    await limiter.close()


async def test_request_keeps_its_place_until_it_ends(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_database(store_url).prepare()
    assert 2 * key_limits._RENEW_S < key_uses.LEASE_S  # so that a request keeps its place if one renewal fails
    monkeypatch.setattr(key_uses, "LEASE_S", 1.5)
    monkeypatch.setattr(key_limits, "_RENEW_S", 0.2)
    one, other = (KeyLimiter(open_database(store_url)) for _ in range(2))
    key = make_key("concurrency=1")
    async with one.admitted(key, audio_s=1, takes_place=True):
        await asyncio.sleep(2)
        assert await admit(other, key) is not None
    assert await admit(other, key) is None
    await asyncio.gather(one.close(), other.close())


async def test_request_cancelled_during_admission_holds_no_place(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_database(store_url).prepare()
    limiter = KeyLimiter(open_database(store_url))
    key, resumed, entered, admit_use = make_key("concurrency=1"), threading.Event(), threading.Event(), KeyUses.admit

    def admit_late(uses: KeyUses, use: Use) -> QuotaError | None:
        entered.set()
        resumed.wait(PATIENCE_S)
        return admit_use(uses, use)

    monkeypatch.setattr(KeyUses, "admit", admit_late)
    leaving = asyncio.create_task(admit(limiter, key))
    await asyncio.to_thread(entered.wait, PATIENCE_S)
    leaving.cancel()
    await asyncio.sleep(0.05)
    resumed.set()
    await asyncio.gather(leaving, return_exceptions=True)
    assert await admit(limiter, key) is None
    await limiter.close()


async def test_metrics_count_admitted_and_refused_requests(tmp_path: Path) -> None:
    metrics = RecordedMetrics()
    limiter = KeyLimiter(open_database(f"sqlite:///{tmp_path / 'jobs.db'}"), metrics=metrics)
    key = make_key("audio-seconds-per-minute=10")
    waits = [await admit(limiter, key, audio_s) for audio_s in (6.0, 5.0, 4.0)]
    assert [wait is None for wait in waits] == [True, False, True]
    assert metrics.counters == {
        ("key_requests", "alice", "admitted"): 2,
        ("key_requests", "alice", "refused"): 1,
        ("key_audio_seconds", "alice"): 10.0,
    }
    await limiter.close()


async def test_metrics_name_a_bounded_number_of_clients(tmp_path: Path) -> None:
    sink = RecordedMetrics()
    limiter = KeyLimiter(open_database(f"sqlite:///{tmp_path / 'jobs.db'}"), metrics=sink)
    for number in range(1000):
        await admit(limiter, make_key("", f"client-{number}"))
    await admit(limiter, parse_key(hash_key("secret")))
    names = {name for metric, name, *_ in sink.counters if metric == "key_requests"}
    assert len(names) == 201
    assert "other" in names
    assert not any(hash_key("secret").startswith(name) for name in names)
    await limiter.close()
