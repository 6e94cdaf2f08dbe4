"""The reports of a job runner to the models of its server, on handles without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from stable_audio_serve.core.metrics import NullMetrics
from stable_audio_serve.core.pricing import WorkSize
from stable_audio_serve.jobs.store.operator_settings import OperatorSettings
from stable_audio_serve.jobs.store.waiting import Waiting
from stable_audio_serve.serving import job_runner as module
from stable_audio_serve.serving.job_runner import JobRunnerReplica
from tests.patience import until


class Handle:
    """A model that is at zero until a test gives it a replica."""

    def __init__(self) -> None:
        self.has_replica = asyncio.Event()
        self.num_asking = 0
        self.words: list[tuple[float, bool]] = []
        self.note_waiting = SimpleNamespace(remote=self._ask)

    def broadcast(self, method: str, *words: Any) -> Any:
        assert method == "note_waiting"

        async def results_async(**_: Any) -> Sequence[None]:
            self.words.append(words)  # type: ignore[arg-type]
            return (None,)

        return SimpleNamespace(results_async=results_async)

    def _ask(self, *words: Any) -> Any:
        self.num_asking += 1
        handle = self

        class Response:
            def __await__(self) -> Any:
                return self._answer().__await__()

            async def _answer(self) -> None:
                await handle.has_replica.wait()
                handle.num_asking -= 1
                handle.words.append(words)  # type: ignore[arg-type]

            def cancel(self) -> None:
                handle.num_asking -= 1

        return Response()


class Replica(JobRunnerReplica):
    """Without an end, because it has no beginning either."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


class Server:
    """One model, the work that waits for it, and the settings of operators."""

    def __init__(self) -> None:
        self.tiny = Handle()
        self.waiting: dict[str, Waiting] | None = {}
        self.current = OperatorSettings()
        self.replica = replica = Replica.__new__(Replica)
        replica._models = ("tiny",)
        replica._handles = {"tiny": self.tiny}  # type: ignore[dict-item]
        replica._telling = {}
        replica._metrics = NullMetrics()  # type: ignore[assignment]
        replica._runner = SimpleNamespace(waiting_work=lambda: self.waiting)  # type: ignore[assignment]
        replica._operator_store = self  # type: ignore[assignment]


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    monkeypatch.setattr(module, "_TELL_S", 0.02)
    server = Server()
    monkeypatch.setattr(module, "reports", lambda model: [model] if server.tiny.has_replica.is_set() else [])
    telling = asyncio.create_task(server.replica._tell_models())
    yield server
    telling.cancel()


@pytest.mark.parametrize("waiting", [{}, None])  # nothing waits, or the database is away
async def test_a_kept_model_is_started_and_reported_until_its_release(server: Server, waiting: Any) -> None:
    server.waiting, tiny = waiting, server.tiny
    await asyncio.sleep(0.1)
    assert (tiny.num_asking, tiny.words) == (0, [])
    server.current = OperatorSettings(kept_models=frozenset({"tiny"}))
    await until(lambda: tiny.num_asking == 1)
    tiny.has_replica.set()
    await until(lambda: len(tiny.words) >= 5)
    assert set(tiny.words) == {(0.0, True)}
    server.current = OperatorSettings()
    await until(lambda: tiny.words[-1] == (0.0, False))
    num_words = len(tiny.words)
    await asyncio.sleep(0.1)
    assert (len(tiny.words), tiny.num_asking) == (num_words, 0)  # or a request would hold the replica


async def test_a_model_that_does_not_start_is_asked_no_longer_than_it_is_kept(server: Server) -> None:
    server.current = OperatorSettings(kept_models=frozenset({"tiny"}))
    await until(lambda: server.tiny.num_asking == 1)
    server.current = OperatorSettings()
    await until(lambda: server.tiny.num_asking == 0)
    await asyncio.sleep(0.1)
    assert (server.tiny.num_asking, server.tiny.words) == (0, [])


async def test_jobs_that_wait_start_a_model_and_are_counted_without_prices_as_none(server: Server) -> None:
    server.waiting = {"tiny": Waiting(3, WorkSize(rows=3.0))}
    await until(lambda: server.tiny.num_asking == 1)
    server.tiny.has_replica.set()
    await until(lambda: len(server.tiny.words) >= 2)
    assert set(server.tiny.words) == {(0.0, False)}
