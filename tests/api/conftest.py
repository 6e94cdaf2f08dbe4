from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.settings import Settings
from tests.backends import ToneBackend


@pytest.fixture
def settings() -> Settings:
    return Settings()


@pytest.fixture
def backend() -> ToneBackend:
    return ToneBackend()


@pytest.fixture
async def client(backend: ToneBackend, settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """The application with its lifespan, without a socket."""
    app = create_app(backend, settings)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield client
