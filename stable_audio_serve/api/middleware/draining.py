"""The end of a process, or a rest: new work is refused, event streams end so that clients reconnect, answers in flight
are counted.

Does not know who ends it: the launcher stops the whole server, an operator takes it out for a while, Ray Serve replaces
one replica by another.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_audio_serve.api.middleware.readiness import Readiness
from stable_audio_serve.core.errors import StoppingError

_CAUSE = "draining"
_STOPPING = "the server is stopping"
_RESTING = "an operator is taking this server out: send new work to another one"
_RETRY_AFTER_S = 5.0
_READING = frozenset({"GET", "HEAD"})


class Draining:
    """One per application, used on its event loop. Neither `leave` nor `stop` can be undone."""

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness
        self._leaving = asyncio.Event()
        self._is_replaced = False
        self._is_stopping = False
        self._is_resting = False
        self._in_flight: set[object] = set()
        self._from_before: set[object] = set()

    @property
    def num_in_flight(self) -> int:
        """Requests that were admitted and whose answers are not complete."""
        return len(self._in_flight)

    @property
    def num_from_before(self) -> int:
        """Those of them that were there when the rest began: what it has to finish."""
        return len(self._from_before)

    @property
    def is_leaving(self) -> bool:
        """Whether clients must follow events on another process."""
        return self._leaving.is_set()

    @property
    def is_stopping(self) -> bool:
        """Whether the whole server ends, so that new requests are refused."""
        return self._is_stopping

    @property
    def is_resting(self) -> bool:
        """Whether an operator takes the whole server out, so that new work is refused."""
        return self._is_resting

    @property
    def refuses_some(self) -> bool:
        """Whether requests count only once they are admitted."""
        return self._is_stopping or self._is_resting

    def leave(self) -> None:
        """Another process takes over: end the event streams, which would keep this one. The rest is still answered."""
        self._is_replaced = True
        self._leaving.set()

    def stop(self) -> None:
        """No other process takes over: refuse new requests from now on, too."""
        self._is_stopping = True
        self._readiness.block(_CAUSE, _STOPPING)
        self.leave()

    def rest(self) -> None:
        """Refuse new work until `resume`: what only reads is answered, so that clients get what was begun here."""
        if self._is_resting or self._is_stopping:
            return
        self._is_resting = True
        self._from_before = set(self._in_flight)
        self._readiness.block(_CAUSE, _RESTING)
        self._leaving.set()

    def resume(self) -> None:
        """Take new work again, unless the server stops."""
        if not self._is_resting or self._is_stopping:
            return
        self._is_resting = False
        self._from_before = set()
        self._readiness.clear(_CAUSE)
        if not self._is_replaced:
            self._leaving.clear()

    def admit(self, scope: Scope) -> None:
        """Let a request in that is no probe. Raises StoppingError for what this server does not take any more."""
        if self._is_stopping:
            raise StoppingError(_STOPPING, retry_after_s=_RETRY_AFTER_S)
        if self._is_resting and scope["method"] not in _READING:
            raise StoppingError(_RESTING, retry_after_s=_RETRY_AFTER_S)
        if "visit" in scope:  # a request that came before counts already
            self._in_flight.add(scope["visit"])

    def begin(self) -> object:
        """Count a request from now on, unless it must be admitted first. Returns it."""
        visit = object()
        if not self.refuses_some:
            self._in_flight.add(visit)
        return visit

    def end(self, visit: object) -> None:
        """Its answer is complete."""
        self._in_flight.discard(visit)
        self._from_before.discard(visit)

    async def pause(self, duration_s: float) -> None:
        """Sleep, at most until this process has to leave."""
        with suppress(TimeoutError):
            async with asyncio.timeout(duration_s):
                await self._leaving.wait()


class DrainingMiddleware:
    """Counts requests in flight, and asks clients of a draining server to close their connections."""

    def __init__(self, app: ASGIApp, *, draining: Draining) -> None:
        self._app = app
        self._draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: PLR0917 - as ASGI has it
        """Run the application. Requests that arrive while the server drains count only if they are admitted."""
        draining = self._draining
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start" and draining.refuses_some:
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        scope["visit"] = visit = draining.begin()
        try:
            await self._app(scope, receive, send_and_close)
        finally:
            draining.end(visit)
