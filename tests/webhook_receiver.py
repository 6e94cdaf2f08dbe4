"""A real HTTP server that records the webhooks that it receives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Receiver:
    """An HTTP server that records the requests that it receives, and gives the same response to each request."""

    answer: bytes = b"HTTP/1.1 204 No Content\r\n\r\n"
    delay_s: float = 0.0
    host: str = "127.0.0.1"
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    num_connections: int = 0
    port: int = 0
    is_over: asyncio.Event = field(default_factory=asyncio.Event)  # ends the delay of all responses

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?a=b"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.strip().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            self.requests.append((first, headers, await reader.readexactly(int(headers["content-length"]))))
            with suppress(TimeoutError):
                async with asyncio.timeout(self.delay_s):
                    await self.is_over.wait()
            writer.write(self.answer)
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def receiving(**options: Any) -> AsyncIterator[Receiver]:
    receiver = Receiver(**options)
    server = await asyncio.start_server(receiver.serve, receiver.host, 0)
    receiver.port = server.sockets[0].getsockname()[1]
    async with server:
        try:
            yield receiver
        finally:
            receiver.is_over.set()  # since Python 3.12, a server that closes waits for its connections
