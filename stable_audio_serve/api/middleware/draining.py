"""The end of a process: new requests are refused, event streams end so that clients reconnect, answers in flight are
counted.

Does not know who ends it: the launcher stops the whole server, Ray Serve replaces one replica by another.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_audio_serve.api.middleware.readiness import Readiness
from stable_audio_serve.core.errors import StoppingError

_REASON = "the server is stopping"
_RETRY_AFTER_S = 5.0


class Draining:
    """One per application, used on its event loop. Neither `leave` nor `stop` can be undone."""

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness
        self._leaving = asyncio.Event()
        self._is_stopping = False
        self.num_in_flight = 0  # requests from before the stop whose answers are not complete

    @property
    def is_leaving(self) -> bool:
        """Whether this process ends, so that clients must follow events on another one."""
        return self._leaving.is_set()

    @property
    def is_stopping(self) -> bool:
        """Whether the whole server ends, so that new requests are refused."""
        return self._is_stopping

    def leave(self) -> None:
        """Another process takes over: end the event streams, which would keep this one. The rest is still answered."""
        self._leaving.set()

    def stop(self) -> None:
        """No other process takes over: refuse new requests from now on, too."""
        self._is_stopping = True
        self._readiness.block("draining", _REASON)
        self.leave()

    def refuse_new(self) -> None:
        """Raises StoppingError while the server stops."""
        if self._is_stopping:
            raise StoppingError(_REASON, retry_after_s=_RETRY_AFTER_S)

    async def pause(self, duration_s: float) -> None:
        """Sleep, at most until this process has to leave."""
        with suppress(TimeoutError):
            async with asyncio.timeout(duration_s):
                await self._leaving.wait()


class DrainingMiddleware:
    """Counts requests in flight, and asks clients of a stopping server to close their connections."""

    def __init__(self, app: ASGIApp, *, draining: Draining) -> None:
        self._app = app
        self._draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: PLR0917 - as ASGI has it
        """Run the application. Requests that arrive while the server stops do not count: they are refused at once."""
        draining = self._draining
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start" and draining.is_stopping:
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        counted = 0 if draining.is_stopping else 1
        draining.num_in_flight += counted
        try:
            await self._app(scope, receive, send_and_close)
        finally:
            draining.num_in_flight -= counted
