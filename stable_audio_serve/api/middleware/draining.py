"""The end of a process, or a rest: new work is refused, event streams end so that clients reconnect, answers in flight
are counted.

There are three causes: the launcher stops the whole server, an operator takes it out for a while, Ray Serve replaces
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
    """One per application, used on its event loop. `leave` and `stop` cannot be undone."""

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness
        self._leaving = asyncio.Event()
        self._is_replaced = False
        self._refusal: str | None = None  # why new work is refused
        self._in_flight: set[object] = set()
        self._at_rest: frozenset[object] | None = None  # in flight when the rest began

    @property
    def num_in_flight(self) -> int:
        """Requests that were admitted and whose answers are not complete."""
        return len(self._in_flight)

    @property
    def num_from_before(self) -> int:
        """The requests in flight that arrived before the rest began, which it has to finish."""
        return len(self._in_flight & (self._at_rest or set()))

    @property
    def is_leaving(self) -> bool:
        """Whether clients must follow events on another process."""
        return self._leaving.is_set()

    @property
    def is_resting(self) -> bool:
        """Whether an operator takes the whole server out, so that new work is refused."""
        return self._at_rest is not None

    @property
    def refuses_some(self) -> bool:
        """Whether requests count only once they are admitted."""
        return self._refusal is not None

    def leave(self) -> None:
        """Another process takes over: end the event streams, which would keep this one. The rest is still answered."""
        self._is_replaced = True
        self._leaving.set()

    def stop(self) -> None:
        """No other process takes over: refuse new requests from now on, too."""
        self._refuse(_STOPPING)
        self.leave()

    def rest(self) -> None:
        """Refuse new work until `resume`. Reading is allowed, so that clients get the results of work begun here."""
        if self._refusal is None:
            self._at_rest = frozenset(self._in_flight)
            self._refuse(_RESTING)
            self._leaving.set()

    def resume(self) -> None:
        """Take new work again, unless the server stops."""
        if self._refusal == _RESTING:
            self._refusal = self._at_rest = None
            self._readiness.clear(_CAUSE)
            if not self._is_replaced:
                self._leaving.clear()

    def admit(self, scope: Scope) -> None:
        """Let a request in that is no probe. Raises StoppingError for what this server does not take any more."""
        refusal = self._refusal
        if refusal == _STOPPING or (refusal is not None and scope["method"] not in _READING):
            raise StoppingError(refusal, retry_after_s=_RETRY_AFTER_S)
        if "visit" in scope:  # a request that came before counts already
            self._in_flight.add(scope["visit"])

    def begin(self) -> object:
        """Count a request from now on, unless it must be admitted first. Returns it."""
        visit = object()
        if self._refusal is None:
            self._in_flight.add(visit)
        return visit

    def end(self, visit: object) -> None:
        """Its answer is complete."""
        self._in_flight.discard(visit)

    async def pause(self, duration_s: float) -> None:
        """Sleep, at most until this process has to leave."""
        with suppress(TimeoutError):
            async with asyncio.timeout(duration_s):
                await self._leaving.wait()

    def _refuse(self, sentence: str) -> None:
        self._refusal = sentence
        self._readiness.block(_CAUSE, sentence)


class DrainingMiddleware:
    """Counts requests in flight, and asks clients of a draining server to close their connections."""

    def __init__(self, app: ASGIApp, *, draining: Draining) -> None:
        self._app = app
        self._draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: PLR0917 - ASGI's signature
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
