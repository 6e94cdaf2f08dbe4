"""A job runner tells each model how much work is waiting for it. Fake handles stand for Ray's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from stable_audio_serve.core.catalog import ModelStatus
from stable_audio_serve.core.pricing import Prices, WorkSize
from stable_audio_serve.jobs.store.operator_jobs import Waiting
from stable_audio_serve.jobs.store.operator_settings import OperatorSettings
from stable_audio_serve.serving import job_runner as module
from stable_audio_serve.serving import model_states
from stable_audio_serve.serving.job_runner import JobRunnerReplica
from tests.patience import until
from tests.recorded_metrics import RecordedMetrics


class Handle:
    """A fake handle of a model. The model has no replica until the test sets `has_replica`."""

    def __init__(self) -> None:
        self.has_replica = asyncio.Event()
        self.answers = asyncio.Event()
        self.answers.set()
        self.num_pending = 0
        self.num_calls = 0
        self.reports: list[tuple[float, bool]] = []
        self.note_waiting = SimpleNamespace(remote=self._call)

    def broadcast(self, method: str, *reports: Any) -> Any:
        assert method == "note_waiting"

        async def results_async(**_: Any) -> Sequence[None]:
            self.reports.append(reports)  # type: ignore[arg-type]
            await self.answers.wait()
            return (None,)

        return SimpleNamespace(results_async=results_async)

    def _call(self, *reports: Any) -> Any:
        self.num_pending += 1
        self.num_calls += 1
        handle = self

        class Response:
            def __await__(self) -> Any:
                return self._answer().__await__()

            async def _answer(self) -> None:
                await handle.has_replica.wait()
                handle.num_pending -= 1
                handle.reports.append(reports)  # type: ignore[arg-type]

            def cancel(self) -> None:
                handle.num_pending -= 1

        return Response()


class Replica(JobRunnerReplica):
    """A job runner without a destructor, because the tests do not start it."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


class Server:
    """A job runner with one model: the model's handle, its waiting work, and the operators' settings."""

    def __init__(self) -> None:
        self.tiny = Handle()
        self.waiting: dict[str, Waiting] | None = {}
        self.current = OperatorSettings()
        self.stage = "idle"
        self.replica = replica = Replica.__new__(Replica)
        replica._models = ("tiny",)
        replica._handles = {"tiny": self.tiny}  # type: ignore[dict-item]
        replica._reports = {}
        replica._status = self._find_status  # type: ignore[method-assign]
        replica._metrics = self.metrics = RecordedMetrics()  # type: ignore[assignment]
        replica._runner = SimpleNamespace(waiting_work=lambda: self.waiting)  # type: ignore[assignment]
        replica._operator_store = self  # type: ignore[assignment]

    async def _find_status(self) -> Mapping[str, ModelStatus]:
        return {"tiny": ModelStatus(self.stage)}


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    monkeypatch.setattr(module, "_REPORT_EVERY_S", 0.02)
    server = Server()
    monkeypatch.setattr(module, "reports", lambda model: [model] if server.tiny.has_replica.is_set() else [])
    reporting = asyncio.create_task(server.replica._report_waiting_work())
    yield server
    reporting.cancel()


@pytest.mark.parametrize("waiting", [{}, None])  # {}: no waiting jobs; None: the database cannot be read
async def test_a_kept_model_is_started_and_reported_until_its_release(server: Server, waiting: Any) -> None:
    server.waiting, tiny = waiting, server.tiny
    await asyncio.sleep(0.1)
    assert (tiny.num_pending, tiny.reports) == (0, [])
    server.current = OperatorSettings(kept_models=frozenset({"tiny"}))
    await until(lambda: tiny.num_pending == 1)
    tiny.has_replica.set()
    await until(lambda: len(tiny.reports) >= 5)
    assert set(tiny.reports) == {(0.0, True)}
    server.current = OperatorSettings()
    await until(lambda: tiny.reports[-1] == (0.0, False))
    num_reports = len(tiny.reports)
    await asyncio.sleep(0.1)
    # A call that is still pending would keep the model's replica from being stopped.
    assert (len(tiny.reports), tiny.num_pending) == (num_reports, 0)


async def test_release_is_reported_although_a_replica_answers_late(server: Server) -> None:
    server.tiny.has_replica.set()
    server.tiny.answers.clear()
    server.current = OperatorSettings(kept_models=frozenset({"tiny"}))
    await until(lambda: server.tiny.reports == [(0.0, True)])
    server.current = OperatorSettings()
    await until(lambda: server.tiny.reports == [(0.0, True), (0.0, False)])


async def test_release_cancels_the_call_that_would_start_the_model(server: Server) -> None:
    server.current = OperatorSettings(kept_models=frozenset({"tiny"}))
    await until(lambda: server.tiny.num_pending == 1)
    server.current = OperatorSettings()
    await until(lambda: server.tiny.num_pending == 0)
    await asyncio.sleep(0.1)
    assert (server.tiny.num_pending, server.tiny.reports) == (0, [])


async def test_model_that_failed_to_load_is_called_again_after_its_pause(server: Server) -> None:
    server.current = OperatorSettings(kept_models=frozenset({"tiny"}))
    await until(lambda: server.tiny.num_pending == 1)
    server.stage = "failed"
    await until(lambda: server.tiny.num_pending == 0)
    num_calls = server.tiny.num_calls
    await asyncio.sleep(0.2)
    # A pending call would keep Ray Serve from another attempt.
    assert (server.tiny.num_calls, server.tiny.num_pending) == (num_calls, 0)
    server.stage = "idle"
    await until(lambda: server.tiny.num_pending == 1)


async def test_waiting_jobs_start_a_model_and_cost_nothing_without_prices(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.waiting = {"tiny": Waiting(3, WorkSize(rows=3.0))}
    await until(lambda: server.tiny.num_pending == 1)
    server.tiny.has_replica.set()
    await until(lambda: len(server.tiny.reports) >= 2)
    assert set(server.tiny.reports) == {(0.0, False)}
    assert server.metrics.gauges["waiting_work_ms", "tiny"] == 0
    monkeypatch.setattr(model_states, "_prices", {"tiny": Prices(1500.0, 0.0, 0.0, 0.0)})
    await until(lambda: server.tiny.reports[-1] == (4.5, False))
    assert server.metrics.gauges["waiting_work_ms", "tiny"] == 4500
