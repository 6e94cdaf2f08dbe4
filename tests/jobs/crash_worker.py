"""A child process that runs jobs with a real engine, for tests that kill or freeze the process.

These child processes (workers) are forked from a process that has imported this module, so they start quickly.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

import sqlalchemy as sa

from stable_audio_serve.core.catalog import ModelCatalog
from stable_audio_serve.core.failpoints import activate
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.jobs.open import open_queue
from stable_audio_serve.jobs.runner.runner import JobRunner
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.outbox import Outbox
from stable_audio_serve.jobs.webhooks.notifier import Notifier
from stable_audio_serve.serving.local import LocalBackend
from tests.factories import ToyModel
from tests.jobs.conftest import SHORT_PAUSES

MODEL = "toy"


def start_worker(context: ForkServerContext, settings: Settings, *, failpoints: str = "") -> BaseProcess:
    """Start a worker. Unless it is killed, it runs until every job has ended and every webhook is sent."""
    process = context.Process(target=_main, args=(settings, failpoints), daemon=True)
    process.start()
    return process


def _main(settings: Settings, active: str) -> None:
    activate(active)
    asyncio.run(_work(settings))


async def _work(settings: Settings) -> None:
    model = ToyModel()
    engine = Engine(model, EngineOptions(mode="strict", torch_threads=1, warmup_budget_s=0.0))
    queue = open_queue(settings)
    if queue.store.database.is_sqlite:
        _freeze_between_transactions(queue.store.database)
    notifier = Notifier(Outbox(queue.store.database), lambda job: {"id": job.spec.id}, settings=settings.jobs)
    async with LocalBackend(ModelCatalog([model.spec.card]), {MODEL: engine}) as backend:
        runner = JobRunner(
            queue.store, queue.artifacts, backend=backend, settings=settings, notifier=notifier, pauses=SHORT_PAUSES
        )
        await runner.start()
        while not await asyncio.to_thread(_is_done, queue.store):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await runner.close()
    await queue.close()


def _freeze_between_transactions(database: Database) -> None:
    """Make this worker wait, before it freezes itself (SIGSTOP), until no other thread uses the SQLite database.

    A process that is frozen during a transaction would block all other processes that use the SQLite file.
    """
    lock = threading.RLock()
    kill = os.kill

    def locked(use: Callable[..., AbstractContextManager[sa.Connection]]) -> Callable[..., Any]:
        @contextmanager
        def use_locked(**options: Any) -> Iterator[sa.Connection]:
            with lock, use(**options) as connection:
                yield connection

        return use_locked

    def kill_alone(pid: int, number: int) -> None:
        with lock if number == signal.SIGSTOP else nullcontext():
            kill(pid, number)

    database.writing = locked(database.writing)  # type: ignore[method-assign]
    database.reading = locked(database.reading)  # type: ignore[method-assign]
    os.kill = kill_alone


def _is_done(store: JobStore) -> bool:
    counts = store.operators.counts()
    return not counts.get("queued") and not counts.get("running") and store.runners.outlook("").webhook_in_s is None
