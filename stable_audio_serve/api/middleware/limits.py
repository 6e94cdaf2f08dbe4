"""ASGI middleware that limits the size of a request body, and the time that a client takes to send and to receive.

It also cancels the handler of a request whose client has disconnected. The ASGI servers do not do all of this: Ray
Serve's proxies have no deadline for receiving a body, and not every server cancels handlers.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_audio_serve.api.middleware.callers import Caller
from stable_audio_serve.core.settings import ApiSettings

MAX_FIELDS_BYTES = 1_048_576  # largest JSON body; also the largest total of a form's fields without its file
MAX_FILE_IN_JSON_BYTES = 33_554_432  # the largest data URI in a JSON body
_CLOSE = {"Connection": "close"}
_RETRY = {"Retry-After": "5"}
_BUSY = _CLOSE | _RETRY
_TOO_MANY_BYTES = "body: too many bytes are being received; retry later (api.max_bodies_bytes)"
_MAX_DROP_S = 10.0
_LEAST_DROPPED_BYTES = 16_777_216
_MAX_DROP_IDLE_S = 1.0
_PIECE_BYTES = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTimes:
    """How fast a client must send its request and read its response.

    A process receives at most `max_slow` slow bodies at once, and at most a quarter as many of one client. A body is
    slow if the server has waited for its data for more than `grace_s` in total. For each request, `grace_s` is randomly
    changed by up to 50 %.
    """

    rate_bytes_s: float = 4096.0  # the lowest speed of a body, averaged over `window_s`
    window_s: float = 10.0
    total_s: float = 300.0  # the longest time in which a client may send the whole body
    grace_s: float = 4.0
    max_slow: int = 256  # the largest number of slow bodies per process; further slow requests get status 503
    send_idle_s: float = 60.0  # the longest time in which a client may read less than 64 KiB of the response

    @property
    def max_slow_per_client(self) -> int:
        return max(1, self.max_slow // 4)


class ClientGoneError(OSError):
    """The client closed its connection or stopped reading, so no response can be sent."""


class LimitsMiddleware:
    """Applies the limits of size and time to every HTTP request. Cancels the handler of a client that disconnects."""

    def __init__(self, app: ASGIApp, *, limits: ApiSettings, times: ClientTimes | None = None) -> None:
        self._app = app
        self._limits = limits
        self._times = times or ClientTimes()
        self._held = _BodiesInProgress()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: PLR0917 - ASGI's signature
        """Run the application with limited `receive` and `send`. Raises ClientGoneError when the client disconnects."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        connection = Connection(receive, send, scope=scope, held=self._held, limits=self._limits, times=self._times)
        scope.setdefault("state", {})["connection"] = connection
        # Ray Serve cancels this task when the client disconnects. The handler has its own task, which is cancelled only
        # once: a second time would interrupt what it does after the first, for example cancelling its job.
        handler = connection.start(self._app)
        try:
            await asyncio.wait({handler})
        except asyncio.CancelledError:
            connection.cancel_handler()
            await asyncio.wait({handler})
            raise
        finally:
            await connection.close()
        if handler.cancelled() and connection.is_gone:
            raise ClientGoneError("the client closed its connection")
        handler.result()


def connection_of(scope: Scope) -> Connection:
    """Return the connection of a request that `LimitsMiddleware` handles."""
    connection: Connection = scope["state"]["connection"]
    return connection


@dataclass(slots=True)
class _BodiesInProgress:
    """The bodies of all requests in progress: their total size, and how many of each client's arrive slowly."""

    num_slow: Counter[str] = field(default_factory=Counter)
    num_bytes: int = 0


class _Pace:
    """Measures how fast a request body arrives, in consecutive windows of time.

    Only the time spent waiting for the client counts, not the time that the handler takes between two chunks.
    """

    def __init__(self, times: ClientTimes) -> None:
        self._times = times
        self.waited_s = 0.0
        self._window_bytes = 0
        self._window_s = 0.0

    @property
    def max_wait_s(self) -> float:
        """How long to wait for the next chunk, in seconds. If none arrives by then, the body is too slow."""
        return self._times.window_s - self._window_s

    def add(self, num_bytes: int, *, waited_s: float) -> None:
        """Count a chunk that arrived. A new window begins once this window has `rate_bytes_s * window_s` bytes."""
        self.waited_s += waited_s
        self._window_bytes += num_bytes
        self._window_s += waited_s
        if self._window_bytes >= self._times.rate_bytes_s * self._times.window_s:
            self._window_bytes, self._window_s = 0, 0.0


def _in_pieces(message: Message) -> Iterator[Message]:
    """Divide a part of a response's body, so that `send_idle_s` applies to each piece of it.

    Applications send up to 1 MiB at once, which takes clients with slow connections longer than `send_idle_s`.
    """
    body = message.get("body", b"")
    if len(body) <= _PIECE_BYTES:
        yield message
        return
    for start in range(0, len(body), _PIECE_BYTES):
        stop = start + _PIECE_BYTES
        yield {**message, "body": body[start:stop], "more_body": stop < len(body) or message.get("more_body", False)}


class Connection:
    """The `receive` and `send` of one request, with limits. Call the methods `accept_*` before the body is read.

    Once the body is complete, a watcher task reads the connection to detect a disconnect.
    """

    def __init__(
        self,
        receive: Receive,
        send: Send,
        *,
        scope: Scope,
        held: _BodiesInProgress,
        limits: ApiSettings,
        times: ClientTimes,
    ) -> None:
        self._receive, self._send = receive, send
        self._handler: asyncio.Task[None] | None = None
        self._is_cancelled = False
        self._scope = scope
        request_headers = dict(scope["headers"])
        declared = request_headers.get(b"content-length", b"")
        self._declared_bytes = int(declared) if declared.isdigit() else 0
        self._has_body = self._declared_bytes > 0 or b"transfer-encoding" in request_headers
        self._waits_for_permission = b"expect" in request_headers  # the client sends the body only after status 100
        self._limit_body(MAX_FIELDS_BYTES, f"body: larger than {MAX_FIELDS_BYTES} bytes")
        self._held, self._limits, self._times = held, limits, times
        self._deadline_at = asyncio.get_running_loop().time() + times.total_s
        self._pace = _Pace(times)
        # Randomized, so that many clients that began together are not all refused at the same moment.
        self._grace_s = times.grace_s * random.uniform(0.5, 1.5)
        self._received_bytes = 0
        self._slow_client: str | None = None  # the client for which the body counts as slow
        self._is_given_up = False  # whether the rest of the body is not needed
        self._unsent_bytes = math.inf  # bytes of the response that are not sent yet; inf if its length is unknown
        self.is_answered = False  # whether the whole response was sent
        self._gone = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    @property
    def is_gone(self) -> bool:
        return self._gone.is_set()

    def start(self, app: ASGIApp) -> asyncio.Task[None]:
        """Start the handler of the request, and return its task."""

        async def handle() -> None:
            await app(self._scope, self.receive, self.send)

        self._handler = asyncio.create_task(handle())
        return self._handler

    def cancel_handler(self) -> None:
        """Cancel the handler. Further calls have no effect."""
        if self._handler is not None and not self._is_cancelled:
            self._is_cancelled = True
            self._handler.cancel()

    def accept_file_body(self) -> None:
        limit = self._limits.max_upload_bytes
        self._limit_body(limit, f"body: the upload is larger than {limit} bytes (api.max_upload_bytes)")

    def accept_form(self) -> None:
        limit = self._limits.max_upload_bytes
        refusal = f"audio: the upload is larger than {limit} bytes (api.max_upload_bytes)"
        self._limit_body(limit + MAX_FIELDS_BYTES, refusal)

    def accept_file_in_json(self) -> None:
        limit = min(MAX_FILE_IN_JSON_BYTES, self._limits.max_upload_bytes) + MAX_FIELDS_BYTES
        self._limit_body(limit, f"body: larger than {limit} bytes; upload the file")

    def _limit_body(self, max_bytes: int, refusal: str) -> None:
        self._max_bytes, self._refusal = max_bytes, refusal

    async def receive(self) -> Message:
        """Return the next part of the body. After the end of the body, wait until the client disconnects.

        Raises HTTPException.
        """
        if self._watcher is not None or self.is_gone:
            await self._gone.wait()
            return {"type": "http.disconnect"}
        message = await self._receive_in_time()
        if message["type"] == "http.disconnect":
            self._gone.set()
            return message
        self._count(len(message.get("body", b"")))
        if max(self._received_bytes, self._declared_bytes) > self._max_bytes:
            await self._drop_rest(message)
            raise HTTPException(413, self._refusal, headers=_CLOSE)
        if self._is_over_total():
            await self._drop_rest(message)
            raise HTTPException(503, _TOO_MANY_BYTES, headers=_BUSY)
        if not message.get("more_body", False):
            self._give_slot()
            self._watcher = asyncio.create_task(self._watch())
        return message

    def count_fetched(self, num_bytes: int) -> None:
        """Count bytes that the server fetches for this request like bytes of its body. Raises HTTPException 503."""
        self._count(num_bytes)
        if self._is_over_total():
            raise HTTPException(503, _TOO_MANY_BYTES, headers=_RETRY)

    def _count(self, num_bytes: int) -> None:
        self._received_bytes += num_bytes
        self._held.num_bytes += num_bytes

    def _is_over_total(self) -> bool:
        """Whether this request must be refused because of the total size of all requests.

        The limit applies only if other requests also have bodies. It refuses only large bodies, so that clients with
        large uploads do not stop the small requests of others.
        """
        is_large = max(self._received_bytes, self._declared_bytes) > MAX_FIELDS_BYTES
        return is_large and self._received_bytes < self._held.num_bytes > self._limits.max_bodies_bytes

    async def send(self, message: Message) -> None:
        """Send a part of the response. Raises ClientGoneError when the client reads too slowly.

        If the response begins before the body was read, the body is read and dropped first. If that takes too long,
        the response closes the connection.
        """
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            self._unsent_bytes = float(headers.get("Content-Length", math.inf))
            if self._has_body and self._watcher is None and not await self._drop_body():
                headers["Connection"] = "close"
        else:
            self._unsent_bytes -= len(message.get("body", b""))
            self.is_answered = not message.get("more_body", False) or self._unsent_bytes <= 0
        try:
            for piece in _in_pieces(message):
                async with asyncio.timeout(self._times.send_idle_s):
                    await self._send(piece)
        except TimeoutError as error:
            raise ClientGoneError("the client stopped reading the response") from error

    async def close(self) -> None:
        """Stop the watcher task, and stop counting the body as in progress."""
        self._held.num_bytes -= self._received_bytes
        self._give_slot()
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)

    async def _receive_in_time(self) -> Message:
        """Return the next part of the body. Raises HTTPException 408, and 503 if there are too many slow bodies."""
        left_s = self._deadline_at - asyncio.get_running_loop().time()
        max_wait_s = self._pace.max_wait_s
        grace_s = self._grace_s - self._pace.waited_s
        if self._slow_client is None and grace_s < min(left_s, max_wait_s):
            with suppress(TimeoutError):
                return await self._wait(grace_s)
            await self._take_slot()
            return await self._receive_in_time()
        try:
            return await self._wait(min(left_s, max_wait_s))
        except TimeoutError as error:
            self._is_given_up = True
            reason = (
                f"did not arrive within {self._times.total_s:g} s"
                if left_s < max_wait_s
                else f"arrived more slowly than {self._times.rate_bytes_s:g} bytes per second"
            )
            raise HTTPException(408, f"body: {reason}", headers=_CLOSE) from error

    async def _take_slot(self) -> None:
        caller: Caller | None = self._scope["state"].get("caller")  # routes set it before they read the body
        client, num_slow = caller.name if caller else "", self._held.num_slow
        if num_slow.total() >= self._times.max_slow or num_slow[client] >= self._times.max_slow_per_client:
            await self._drop_rest({"more_body": True})
            raise HTTPException(503, "body: too many slow uploads are in progress; retry later", headers=_BUSY)
        num_slow[client] += 1
        self._slow_client = client

    def _give_slot(self) -> None:
        if self._slow_client is not None:
            self._held.num_slow[self._slow_client] -= 1
            self._held.num_slow += Counter()  # removes the entries of clients without slow bodies
        self._slow_client = None

    async def _wait(self, timeout_s: float) -> Message:
        """Return the next part of the body. Raises TimeoutError after `timeout_s`."""
        clock = asyncio.get_running_loop().time
        began_at, num_bytes = clock(), 0
        try:
            async with asyncio.timeout(timeout_s):
                message = await self._receive()
            num_bytes = len(message.get("body", b""))
            return message
        finally:
            self._pace.add(num_bytes, waited_s=clock() - began_at)

    async def _drop_body(self) -> bool:
        """Read and drop the request body before a response that does not need it. Returns whether the body is complete.

        Many clients read no response while they send the body. If the server closed the connection before the body has
        arrived, the rest of the body would reset the connection, and the response could be lost.
        """
        if self._is_given_up or (self._waits_for_permission and not self._received_bytes):
            return False
        return await self._drop_rest({"more_body": True})

    async def _drop_rest(self, message: Message) -> bool:
        """Read and drop the rest of the body. Stops after a limit of bytes and time, or when the client pauses.

        Returns whether the body is complete.
        """
        self._is_given_up = True
        deadline_at = asyncio.get_running_loop().time() + _MAX_DROP_S
        max_bytes, dropped_bytes = max(_LEAST_DROPPED_BYTES, 2 * self._max_bytes), 0
        while message.get("more_body", False) and dropped_bytes < max_bytes:
            left_s = deadline_at - asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(min(_MAX_DROP_IDLE_S, left_s)):
                    message = await self._receive()
            except TimeoutError:
                return False
            dropped_bytes += len(message.get("body", b""))
        return message["type"] == "http.request" and not message.get("more_body", False)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self.is_answered:  # after a complete response, ASGI servers report a disconnect too
            self._gone.set()
            self.cancel_handler()
