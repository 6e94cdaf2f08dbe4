"""ASGI middleware that bounds what clients may cost: body sizes, receive and send times, and work after they have gone.

Neither of Ray Serve's proxies has receive deadlines, and not every server cancels a handler whose client has gone: this
middleware does both under any server.
"""

from __future__ import annotations

import asyncio
import math
import random
from contextlib import suppress
from dataclasses import dataclass, replace

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_audio_serve.core.settings import ApiSettings

# With these Ray Serve lets a client change its own deadline or switch its own cancellation off.
_CONTROL_HEADERS = frozenset({b"x-request-timeout-seconds", b"x-request-disconnect-disabled"})
MAX_FIELDS_BYTES = 1_048_576  # of a JSON body, and of a form besides its upload
_CLOSE = {"Connection": "close"}
_BUSY = {"Connection": "close", "Retry-After": "5"}
_MAX_DRAIN_S = 10.0
_MAX_DROPPED_BYTES = 16_777_216
_MAX_DRAIN_IDLE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTimes:
    """How slowly a client may send its request and read its answer."""

    rate_bytes_s: float = 4096.0  # averaged over `window_s`
    window_s: float = 10.0
    total_s: float = 300.0  # until the whole body is there
    grace_s: float = 4.0  # a body that arrives within this time, half of it more or less, takes no place
    max_slow: int = 256  # bodies at a time that take longer, per process
    send_idle_s: float = 60.0  # without reading anything of the answer


class ClientGoneError(OSError):
    """The client closed its connection or stopped reading; nobody is left to answer."""


class LimitsMiddleware:
    """Applies `ApiSettings` to every HTTP request. A handler whose client goes away is cancelled."""

    def __init__(self, app: ASGIApp, *, limits: ApiSettings, times: ClientTimes | None = None) -> None:
        self._app = app
        self._limits = limits
        self._times = times or ClientTimes()
        self._held = _Held()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: PLR0917 - as ASGI has it
        """Run the application on a guarded connection. Raises ClientGoneError when the client has gone."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name not in _CONTROL_HEADERS]
        handler = asyncio.current_task()
        assert handler is not None
        connection = _Connection(
            receive,
            send,
            handler=handler,
            body=_body_limit(scope),
            held=self._held,
            limits=self._limits,
            times=self._times,
        )
        scope.setdefault("state", {})["connection"] = connection
        try:
            await self._app(scope, connection.receive, connection.send)
        except asyncio.CancelledError:
            if connection.is_gone and handler.uncancel() == 0:
                raise ClientGoneError("the client closed its connection") from None
            raise
        finally:
            await connection.close()


def accept_file_body(scope: Scope) -> None:
    """Let the body of this request be as large as an upload; called before its first byte is read."""
    scope["state"]["connection"].accept_file_body()


def accept_form(scope: Scope) -> None:
    """Let the body of this request be a form with an upload; called before its first byte is read."""
    scope["state"]["connection"].accept_form()


async def drop_body(scope: Scope) -> None:
    """Read and drop some of a body that is refused unread, so that a client which is still sending reads why.

    One that waits to be asked for it (`Expect`) is not asked.
    """
    if not any(name == b"expect" for name, _ in scope["headers"]):
        await scope["state"]["connection"].drop_body()


def is_answered(scope: Scope) -> bool:
    """Whether the last byte of the answer has been passed on: a client that goes now has all of it."""
    connection = scope["state"].get("connection")
    return connection is not None and connection.is_answered


@dataclass(slots=True)
class _Held:
    """Bodies of all requests in progress: their bytes, in memory or in temporary files, and how many arrive slowly."""

    num_slow: int = 0
    num_bytes: int = 0


class _Pace:
    """How fast a body arrives: bytes, and seconds of waiting for its client, in total and of the last stretch.

    The time that a handler takes between two parts does not count: it is not the client's.
    """

    def __init__(self, times: ClientTimes) -> None:
        self._times = times
        self.waited_s = 0.0
        self._stretch_bytes = 0
        self._stretch_s = 0.0

    @property
    def patience_s(self) -> float:
        """Seconds to wait for more before the average of the last stretch is too low."""
        return self._times.window_s - self._stretch_s

    def add(self, num_bytes: int, *, waited_s: float) -> None:
        """Count a part that arrived. A stretch ends once a window's worth has arrived, and the next one begins."""
        self.waited_s += waited_s
        self._stretch_bytes += num_bytes
        self._stretch_s += waited_s
        if self._stretch_bytes >= self._times.rate_bytes_s * self._times.window_s:
            self._stretch_bytes, self._stretch_s = 0, 0.0


@dataclass(frozen=True, slots=True)
class _BodyLimit:
    max_bytes: int
    declared_bytes: int  # 0 where the client does not say
    is_there: bool
    refusal: str


def _body_limit(scope: Scope) -> _BodyLimit:
    headers = dict(scope["headers"])
    declared = headers.get(b"content-length", b"")
    declared_bytes = int(declared) if declared.isdigit() else 0
    refusal = f"body: larger than {MAX_FIELDS_BYTES} bytes"
    is_there = declared_bytes > 0 or b"transfer-encoding" in headers
    return _BodyLimit(MAX_FIELDS_BYTES, declared_bytes, is_there, refusal)


class _Connection:
    """One request's receive and send. Once the body is complete, a watcher is the only reader of the connection."""

    def __init__(
        self,
        receive: Receive,
        send: Send,
        *,
        handler: asyncio.Task[object],
        body: _BodyLimit,
        held: _Held,
        limits: ApiSettings,
        times: ClientTimes,
    ) -> None:
        self._receive, self._send, self._handler = receive, send, handler
        self._body, self._held, self._limits, self._times = body, held, limits, times
        self._deadline_at = asyncio.get_running_loop().time() + times.total_s
        self._pace = _Pace(times)
        # Random: a thousand clients that came together would be refused together, and block the loop.
        self._grace_s = times.grace_s * random.uniform(0.5, 1.5)
        self._received_bytes = 0
        self._is_counted = False
        self._unsent_bytes = math.inf  # of the answer, where its length is known
        self.is_answered = False
        self._gone = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    @property
    def is_gone(self) -> bool:
        return self._gone.is_set()

    def accept_file_body(self) -> None:
        limit = self._limits.max_upload_bytes
        refusal = f"body: the upload is larger than {limit} bytes (api.max_upload_bytes)"
        self._body = replace(self._body, max_bytes=limit, refusal=refusal)

    def accept_form(self) -> None:
        limit = self._limits.max_upload_bytes
        refusal = f"audio: the upload is larger than {limit} bytes (api.max_upload_bytes)"
        self._body = replace(self._body, max_bytes=limit + MAX_FIELDS_BYTES, refusal=refusal)

    async def drop_body(self) -> None:
        await self._drain({"more_body": self._body.is_there}, max_bytes=_MAX_DROPPED_BYTES)

    async def receive(self) -> Message:
        """Returns the next part of the body; at its end, waits for a disconnect. Raises HTTPException 408, 413, 503."""
        if self._watcher is not None or self.is_gone:
            await self._gone.wait()
            return {"type": "http.disconnect"}
        message = await self._receive_in_time()
        if message["type"] == "http.disconnect":
            self._gone.set()
            return message
        num_bytes = len(message.get("body", b""))
        self._received_bytes += num_bytes
        self._held.num_bytes += num_bytes
        if max(self._received_bytes, self._body.declared_bytes) > self._body.max_bytes:
            await self._drain(message, max_bytes=2 * self._body.max_bytes)
            raise HTTPException(413, self._body.refusal, headers=_CLOSE)
        if (
            self._received_bytes < self._held.num_bytes > self._limits.max_bodies_bytes
        ):  # a body that is alone is accepted
            await self._drain(message, max_bytes=2 * self._body.max_bytes)
            reason = "body: too much is being received from others (api.max_bodies_bytes)"
            raise HTTPException(503, reason, headers=_BUSY)
        if not message.get("more_body", False):
            self._count(False)
            self._watcher = asyncio.create_task(self._watch())
        return message

    async def send(self, message: Message) -> None:
        """Pass on a part of the answer. Raises ClientGoneError when the client reads too slowly.

        An answer sent before the whole body has arrived is the connection's last: nobody reads the rest.
        """
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            self._unsent_bytes = float(headers.get("Content-Length", math.inf))
            if self._body.is_there and self._watcher is None:
                headers["Connection"] = "close"
        else:
            self._unsent_bytes -= len(message.get("body", b""))
            self.is_answered = not message.get("more_body", False) or self._unsent_bytes <= 0
        try:
            async with asyncio.timeout(self._times.send_idle_s):
                await self._send(message)
        except TimeoutError as error:
            raise ClientGoneError("the client stopped reading its answer") from error

    async def close(self) -> None:
        """Stop watching, and no longer count the body."""
        self._held.num_bytes -= self._received_bytes
        self._count(False)
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)

    async def _receive_in_time(self) -> Message:
        """Returns the next part of the body. Raises HTTPException 408, and 503 where no place is free."""
        left_s = self._deadline_at - asyncio.get_running_loop().time()
        patience_s = self._pace.patience_s
        grace_s = self._grace_s - self._pace.waited_s
        if not self._is_counted and grace_s < min(left_s, patience_s):
            with suppress(TimeoutError):
                return await self._wait(grace_s)
            await self._take_place()
            return await self._receive_in_time()
        try:
            return await self._wait(min(left_s, patience_s))
        except TimeoutError as error:
            reason = (
                f"did not arrive within {self._times.total_s:g} s"
                if left_s < patience_s
                else f"must arrive at {self._times.rate_bytes_s:g} bytes a second or more"
            )
            raise HTTPException(408, f"body: {reason}", headers=_CLOSE) from error

    async def _take_place(self) -> None:
        if self._held.num_slow >= self._times.max_slow:
            await self._drain({"more_body": True}, max_bytes=2 * self._body.max_bytes)
            raise HTTPException(503, "body: too many others are being received", headers=_BUSY)
        self._count(True)

    async def _wait(self, timeout_s: float) -> Message:
        """Returns the next part. Raises TimeoutError."""
        clock = asyncio.get_running_loop().time
        began_at, num_bytes = clock(), 0
        try:
            async with asyncio.timeout(timeout_s):
                message = await self._receive()
            num_bytes = len(message.get("body", b""))
            return message
        finally:
            self._pace.add(num_bytes, waited_s=clock() - began_at)

    def _count(self, is_receiving: bool) -> None:
        """Count this body as being received, or no longer."""
        if is_receiving is not self._is_counted:
            self._held.num_slow += 1 if is_receiving else -1
        self._is_counted = is_receiving

    async def _drain(self, message: Message, *, max_bytes: int) -> None:
        """Read and drop the rest as long as it keeps coming: a client that is still sending reads no refusal."""
        deadline_at = asyncio.get_running_loop().time() + _MAX_DRAIN_S
        dropped_bytes = 0
        while message.get("more_body", False) and dropped_bytes < max_bytes:
            left_s = deadline_at - asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(min(_MAX_DRAIN_IDLE_S, left_s)):
                    message = await self._receive()
            except TimeoutError:
                return
            dropped_bytes += len(message.get("body", b""))

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self.is_answered:  # servers also report the end of a complete answer as a disconnect
            self._gone.set()
            self._handler.cancel()
