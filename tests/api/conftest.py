from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
import structlog
from fastapi import FastAPI

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.settings import Settings
from tests.backends import ToneBackend


@pytest.fixture(scope="session", autouse=True)
def _plain_logs() -> None:
    structlog.configure([structlog.processors.format_exc_info, structlog.processors.LogfmtRenderer()])


@pytest.fixture(scope="session")
def shared() -> Iterator[tuple[FastAPI, ToneBackend]]:
    """One application for all tests that need no settings of their own; building it is the slow part."""
    backend = ToneBackend()
    app = create_app(backend, Settings())
    yield app, backend

    async def run_lifespan() -> None:
        async with app.router.lifespan_context(app):
            pass

    asyncio.run(run_lifespan())


@pytest.fixture
def backend(shared: tuple[FastAPI, ToneBackend]) -> ToneBackend:
    """The shared application's backend, as new."""
    backend = shared[1]
    vars(backend).update(vars(ToneBackend()))
    return backend


@pytest.fixture
async def client(shared: tuple[FastAPI, ToneBackend], backend: ToneBackend) -> AsyncIterator[httpx.AsyncClient]:
    """The application without a socket."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(shared[0]), base_url="http://test") as client:
        yield client
