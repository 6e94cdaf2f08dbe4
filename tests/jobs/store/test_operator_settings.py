"""All processes of a server share the settings that operators change, and keep them during a database outage."""

from __future__ import annotations

import asyncio

import pytest

from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.jobs.store import operator_settings as module
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.operator_settings import OperatorSettings, OperatorStore
from tests.jobs.stores import contract_store_url as store_url
from tests.jobs.stores import database, open_database, postgres_with_tables, wall
from tests.patience import until

__all__ = ["database", "postgres_with_tables", "store_url", "wall"]

NOTHING = OperatorSettings()


def test_settings_reach_every_process_of_one_server(database: Database, store_url: str) -> None:
    one, other = (OperatorStore(database, server) for server in ("session_1/audio", "session_2/audio"))
    elsewhere = open_database(store_url)
    same = OperatorStore(elsewhere, "session_1/audio")
    assert (one.current, one.read(), same.read()) == (NOTHING, NOTHING, NOTHING)
    one.keep("small/one")
    same.keep("tiny")
    one.keep("tiny")
    same.drain()
    one.drain()
    assert one.read() == same.read() == OperatorSettings(True, frozenset({"small/one", "tiny"}))
    assert other.read() == NOTHING
    other.drain()
    same.release("tiny")
    same.release("never")
    one.resume()
    one.resume()
    assert one.read() == same.read() == OperatorSettings(False, frozenset({"small/one"}))
    assert other.read() == OperatorSettings(True)
    elsewhere.close()


def test_writer_sees_its_setting_at_once(database: Database) -> None:
    store = OperatorStore(database, "audio")
    store.drain()
    store.keep("tiny")
    assert store.current == OperatorSettings(True, frozenset({"tiny"}))
    store.resume()
    store.release("tiny")
    assert store.current == NOTHING


@pytest.mark.parametrize("error", [StorageError("no answer"), RuntimeError("can't start new thread")])
async def test_last_settings_hold_during_an_outage(
    database: Database, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(module, "_READ_EVERY_S", 0.01)
    monkeypatch.setattr(module, "_RETRY_S", 0.01)
    operator, process = (OperatorStore(database, "audio") for _ in range(2))
    applied: list[OperatorSettings] = []
    following = asyncio.create_task(process.follow(applied.append))
    await until(lambda: applied[-1:] == [NOTHING])
    operator.keep("tiny")
    await until(lambda: applied[-1] == OperatorSettings(False, frozenset({"tiny"})))
    read, num_failures = process.read, 0

    def fail() -> OperatorSettings:
        nonlocal num_failures
        num_failures += 1
        raise error

    monkeypatch.setattr(process, "read", fail)
    operator.drain()
    await until(lambda: num_failures >= 3)
    assert process.current == applied[-1] == OperatorSettings(False, frozenset({"tiny"}))
    monkeypatch.setattr(process, "read", read)
    await until(lambda: applied[-1] == OperatorSettings(True, frozenset({"tiny"})))
    following.cancel()
