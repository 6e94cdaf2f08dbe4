from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio
from fastapi import FastAPI

from stable_audio_serve.api.streams import StreamLimits
from stable_audio_serve.client import AsyncClient, Client, Retries
from stable_audio_serve.jobs.store.tables import JOBS
from tests.api.compat.serving import make_app, serve_app
from tests.backends import ToneBackend
from tests.sockets import listening

POLLS = StreamLimits(first_poll_s=0.05, last_poll_s=0.1)
QUICK = Retries(most=3, most_wait_s=20.0, first_pause_s=0.01)


@dataclass
class Served:
    """A running application with a job runner, and its URL."""

    url: str
    backend: ToneBackend


@asynccontextmanager
async def serve(
    backend: ToneBackend | None = None, *, stream_limits: StreamLimits = POLLS, **settings: Any
) -> AsyncIterator[Served]:
    async with serve_app(backend, stream_limits=stream_limits, **settings) as (port, backend):
        yield Served(f"http://127.0.0.1:{port}", backend)


IN_ONE_LOOP = pytest.mark.asyncio(loop_scope="module")  # a module's tests share a server and its event loop


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[tuple[FastAPI, Served]]:
    async with make_app(stream_limits=POLLS) as (app, backend), listening(app, lifespan="off") as port:
        yield app, Served(f"http://127.0.0.1:{port}", backend)


@pytest_asyncio.fixture(loop_scope="module")
async def served(server: tuple[FastAPI, Served]) -> Served:
    """Reset the backend of the server that the module's tests share, and delete its jobs. Returns the server."""
    app, served = server
    with app.state.jobs.store.database.writing() as connection:
        connection.execute(JOBS.delete())
    vars(served.backend).update(vars(ToneBackend()))
    return served


class Caller:
    """Calls methods of a synchronous or an asynchronous client in the same way, so that one test covers both."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client = client

    async def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the client by name, such as `jobs.get`.

        Returns the method's result. If the result is an iterator, returns a list of its items.
        """
        target: Any = self.client
        for part in name.split("."):
            target = getattr(target, part)
        if isinstance(self.client, Client):
            return await asyncio.to_thread(lambda: _list(target(*args, **kwargs)))
        found = target(*args, **kwargs)
        return [each async for each in found] if hasattr(found, "__aiter__") else await found

    async def close(self) -> None:
        if isinstance(self.client, Client):
            self.client.close()
        else:
            await self.client.close()


def _list(found: Any) -> Any:
    return list(found) if hasattr(found, "__next__") else found


# For tests of what the module `operations` does, which both clients use.
ASYNC = pytest.mark.parametrize("connect", [AsyncClient], indirect=True)


@pytest_asyncio.fixture(params=[Client, AsyncClient], loop_scope="module")
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Callable[..., Caller]]:
    callers = []

    def make(url: str, *, retries: Retries = QUICK, **options: Any) -> Caller:
        callers.append(Caller(request.param(url, retries=retries, **options)))
        return callers[-1]

    yield make
    for caller in callers:
        await caller.close()
