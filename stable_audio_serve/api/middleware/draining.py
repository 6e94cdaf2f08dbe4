"""Stop or drain a process: refuse new work, end event streams so that clients reconnect, and count open requests.

There are three cases. The launcher stops the whole server (`stop`), an operator drains it for a while (`drain`), or Ray
Serve replaces this replica by another one (`leave`).
"""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_audio_serve.core.clock import Clock
from stable_audio_serve.core.errors import StoppingError

_STOPPING = "the server is stopping"
_DRAINING = "an operator is draining this server; send new work to another server"
_RETRY_AFTER_S = 5.0
# A load balancer keeps sending requests until two of its checks of /ready have failed, which takes about 3 s, or longer
# on a busy machine. A stopping server refuses such requests, so that the balancer can send them to another server. If
# it exited at once, connections would break, and the balancer could not know whether requests were executed. Therefore,
# the server exits when no request has arrived for `_QUIET_S`. Clients that never stop delay the exit for `_NOTICE_S`.
_QUIET_S = 3.0
_NOTICE_S = 10.0
_CHECKS_EVERY_S = 10.0  # a load balancer's longest time between two checks of /ready, for example that of Kubernetes
# Requests that start no work: they read or cancel. fal's proxy passes on its requests to routes that check them again.
_WORKLESS_METHODS = frozenset({"GET", "HEAD", "DELETE"})
_WORKLESS_PATHS = ("/cancel", "/api/fal/proxy")


def _starts_work(scope: Scope) -> bool:
    return scope["method"] not in _WORKLESS_METHODS and not scope["path"].endswith(_WORKLESS_PATHS)


class Draining:
    """Tracks whether this process accepts new work, and which requests are in flight.

    Each application has one instance and uses it on its event loop only. `leave` and `stop` cannot be undone.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        # The reason why new work is refused, None if it is accepted. While work is refused, a new request counts as in
        # flight only once `admit` accepts it.
        self.refusal: str | None = None
        self._leaving = asyncio.Event()
        self._is_replaced = False
        self._in_flight: set[object] = set()
        self._at_drain: frozenset[object] | None = None  # requests in flight when `drain` was called
        self._stopped_at: float | None = None
        self._last_request_at = self._last_check_at = -math.inf

    @property
    def num_in_flight(self) -> int:
        """The number of admitted requests whose responses are not complete."""
        return len(self._in_flight)

    @property
    def num_left(self) -> int:
        """The number of requests in flight that arrived before `drain` was called. The drain waits for them."""
        return len(self._in_flight & (self._at_drain or set()))

    @property
    def may_exit(self) -> bool:
        """Whether `stop` was called, nothing is in flight, and no load balancer needs more time to notice the stop."""
        if self._stopped_at is None or self._in_flight:
            return False
        quiet_since = self._last_request_at
        if self._stopped_at - self._last_check_at < _CHECKS_EVERY_S:  # so there is a load balancer
            quiet_since = max(quiet_since, self._stopped_at)
        now = self._clock.monotonic()
        return now - quiet_since >= _QUIET_S or now - self._stopped_at >= _NOTICE_S

    @property
    def is_leaving(self) -> bool:
        """Whether event streams must end, so that clients reconnect to another process."""
        return self._leaving.is_set()

    @property
    def is_draining(self) -> bool:
        """Whether an operator drains the whole server, so that new work is refused."""
        return self._at_drain is not None

    def leave(self) -> None:
        """End the event streams, because another process replaces this one. Open streams would keep this one running.

        Other requests are still answered.
        """
        self._is_replaced = True
        self._leaving.set()

    def stop(self) -> None:
        """End the event streams and refuse all new requests, because the server stops."""
        if self._stopped_at is None:
            self._stopped_at = self._clock.monotonic()
        self.refusal = _STOPPING
        self.leave()

    def drain(self) -> None:
        """Refuse new work until `resume`. Clients can still fetch earlier results, and cancel jobs."""
        if self.refusal is None:
            self._at_drain = frozenset(self._in_flight)
            self.refusal = _DRAINING
            self._leaving.set()

    def resume(self) -> None:
        """Accept new work again, unless the server is stopping."""
        if self.refusal == _DRAINING:
            self.refusal = self._at_drain = None
            if not self._is_replaced:
                self._leaving.clear()

    def admit(self, scope: Scope) -> None:
        """Count a request as in flight. Raises StoppingError to refuse it. Not called for health probes."""
        self._last_request_at = self._clock.monotonic()
        if self.refusal == _STOPPING or (self.refusal is not None and _starts_work(scope)):
            raise StoppingError(self.refusal, retry_after_s=_RETRY_AFTER_S)
        if "in_flight_token" in scope:  # `begin` may have added the token already; then this has no effect
            self._in_flight.add(scope["in_flight_token"])

    def check(self) -> None:
        """Record that a load balancer has requested /ready."""
        self._last_check_at = self._clock.monotonic()

    def begin(self) -> object:
        """Return a token for a new request.

        The request counts as in flight at once, or if new work is refused, only when `admit` accepts it.
        """
        token = object()
        if self.refusal is None:
            self._in_flight.add(token)
        return token

    def end(self, token: object) -> None:
        self._in_flight.discard(token)

    async def pause(self, duration_s: float) -> None:
        """Sleep for `duration_s`, or until event streams must end."""
        with suppress(TimeoutError):
            async with asyncio.timeout(duration_s):
                await self._leaving.wait()


class DrainingMiddleware:
    """Counts requests in flight, and asks clients of a draining server to close their connections."""

    def __init__(self, app: ASGIApp, *, draining: Draining) -> None:
        self._app = app
        self._draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: PLR0917 - ASGI's signature
        draining = self._draining
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start" and draining.refusal is not None:
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        scope["in_flight_token"] = token = draining.begin()
        try:
            await self._app(scope, receive, send_and_close)
        finally:
            draining.end(token)
