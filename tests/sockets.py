"""Run ASGI applications so that clients can reach them over a real socket of this machine."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from tests.patience import until


@asynccontextmanager
async def listening(app: ASGIApp, *, send_buffer_bytes: int | None = None, **options: Any) -> AsyncIterator[int]:
    """Serve the application with uvicorn, with these options, on a free port. Yields the port.

    `send_buffer_bytes` is the size of the kernel's buffer for data that a client has not read yet. By default it grows
    to several megabytes.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if send_buffer_bytes is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1, **options)
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve([listener]))
        await until(lambda: server.started)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await task
