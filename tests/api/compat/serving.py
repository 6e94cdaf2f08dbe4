"""Build applications with custom settings and a job runner. Clients reach them in this process or over a socket."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_audio_serve.api.app import create_app
from stable_audio_serve.api.streams import StreamLimits
from stable_audio_serve.api.webhook_bodies import webhook_bodies
from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.core.operations import Operations
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.jobs.open import open_queue
from stable_audio_serve.jobs.runner.attempt import RunnerPauses
from stable_audio_serve.jobs.runner.runner import JobRunner
from stable_audio_serve.jobs.store.health import StoreWatch
from stable_audio_serve.jobs.store.outbox import Outbox
from stable_audio_serve.jobs.webhooks.notifier import Notifier
from tests.backends import ToneBackend
from tests.jobs.conftest import SHORT_PAUSES
from tests.quick_apps import build_quickly
from tests.sockets import listening

build_quickly()


@asynccontextmanager
async def make_app(
    backend: ToneBackend | None = None,
    *,
    run_jobs: bool = True,
    hasty: bool = False,
    stream_limits: StreamLimits | None = None,
    operations: Operations | None = None,
    metrics: Metrics | None = None,
    **settings: Any,
) -> AsyncIterator[tuple[FastAPI, ToneBackend]]:
    """Yield an application with these settings and a temporary folder for jobs.

    If `hasty`, the job runner pauses only briefly before it retries, and every health request checks the stores.
    """
    backend = backend or ToneBackend()
    with tempfile.TemporaryDirectory() as folder:
        parsed = Settings.model_validate({"output_dir": folder, **settings})
        jobs = open_queue(parsed)
        if hasty:
            jobs.watch = StoreWatch(jobs.store.database, jobs.artifacts, fresh_s=0.0, fresh_if_bad_s=0.0)
        app = create_app(
            backend, parsed, jobs=jobs, stream_limits=stream_limits, operations=operations, metrics=metrics
        )
        app.state.jobs = jobs
        app.state.output_dir = parsed.output_dir  # for tests that inspect stored files
        notifier = Notifier(Outbox(jobs.store.database), webhook_bodies(jobs.artifacts), settings=parsed.jobs)
        pauses = SHORT_PAUSES if hasty else RunnerPauses()
        runner = JobRunner(
            jobs.store, jobs.artifacts, backend=backend, settings=parsed, notifier=notifier, pauses=pauses
        )
        if run_jobs:
            await runner.start()
            jobs.wake = runner.wake
        async with app.router.lifespan_context(app):
            yield app, backend
            await runner.close()


@asynccontextmanager
async def make_client(
    backend: ToneBackend | None = None, **options: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, ToneBackend]]:
    """Yield an in-process client of an application that `make_app` builds."""
    async with (
        make_app(backend, **options) as (app, backend),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client,
    ):
        yield client, backend


@contextmanager
def keep_app(backend: ToneBackend | None = None, **settings: Any) -> Iterator[tuple[FastAPI, ToneBackend]]:
    """Yield an application, without a job runner, that all tests of a module share. Each test calls `connect_anew`."""
    backend = backend or ToneBackend()
    with tempfile.TemporaryDirectory() as folder:
        app = create_app(backend, Settings.model_validate({"output_dir": folder, **settings}))
        yield app, backend

        async def run_lifespan() -> None:
            async with app.router.lifespan_context(app):
                pass

        asyncio.run(run_lifespan())


@asynccontextmanager
async def connect_anew(kept: tuple[FastAPI, ToneBackend]) -> AsyncIterator[tuple[httpx.AsyncClient, ToneBackend]]:
    """Reset the backend of an application that several tests share, and yield a client of the application."""
    app, backend = kept
    vars(backend).update(vars(type(backend)(catalog=backend.catalog)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        yield client, backend


def make_hasty_client(**options: Any) -> AbstractAsyncContextManager[tuple[httpx.AsyncClient, ToneBackend]]:
    """Yield an in-process client of an application that retries after short pauses, for tests with failing stores."""
    return make_client(hasty=True, **options)


@asynccontextmanager
async def serve_app(
    backend: ToneBackend | None = None,
    *,
    certificate: tuple[Path, Path] | None = None,
    refusals: Counter[int] | None = None,
    **settings: Any,
) -> AsyncIterator[tuple[int, ToneBackend]]:
    """Serve an application that `make_app` builds. Yields its port and its backend.

    `certificate` has the paths of the certificate chain and of its key. If it is None, the server uses plain HTTP.

    `refusals` counts the responses with a status of 400 or above, by status.
    """
    async with make_app(backend, **settings) as (app, backend):
        tls = {"ssl_certfile": certificate[0], "ssl_keyfile": certificate[1]} if certificate else {}
        served = app if refusals is None else _counting(app, refusals)
        async with listening(served, lifespan="off", **tls) as port:
            yield port, backend


def _counting(app: ASGIApp, refusals: Counter[int]) -> ASGIApp:
    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        async def count(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                refusals[message["status"]] += 1
            await send(message)

        await app(scope, receive, count)

    return counted
