"""A store's own worker threads: a slow disk or service holds up nobody who does not need it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import structlog

from stable_audio_serve.core.errors import StorageError

T = TypeVar("T")

log = structlog.get_logger("stable_audio_serve.artifacts")

_WIND_DOWN_S = 1.0  # how long a cancelled caller waits for its work to be undone; it is undone in any case


class StoppedError(Exception):
    """Work was told to stop, and has left nothing behind."""


def until_stopped(chunks: Iterable[bytes], stop: threading.Event) -> Iterator[bytes]:
    """`chunks` until `stop` is set. Raises StoppedError."""
    for chunk in chunks:
        if stop.is_set():
            raise StoppedError
        yield chunk


class StoreThreads:
    """Runs blocking work so that cancelling its caller undoes it."""

    def __init__(self, num_threads: int, *, name: str) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)

    async def run(self, work: Callable[[threading.Event], T], *, undo: Callable[[], None]) -> T:
        """What `work` returns. When its caller is cancelled, the event is set, and work that ends anyhow is undone."""
        stop = threading.Event()
        future = self._pool.submit(work, stop)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            stop.set()
            if not future.cancel():
                undoing = self._pool.submit(_undo, future, undo)
                await asyncio.wait([asyncio.wrap_future(undoing)], timeout=_WIND_DOWN_S)
            raise

    async def call(self, work: Callable[[], T]) -> T:
        """What `work` returns; it goes on when the caller is cancelled."""
        return await asyncio.wrap_future(self._pool.submit(work))

    async def stream(self, chunks: Generator[bytes]) -> AsyncGenerator[bytes]:
        """`chunks`, each made on a thread; the generator is closed at the end, whoever ends it."""
        future: Future[bytes | None] | None = None
        try:
            while True:
                future = self._pool.submit(partial(next, chunks, None))
                chunk = await asyncio.wrap_future(future)
                if chunk is None:
                    return
                yield chunk
        finally:
            if future is not None:  # it may be in the generator at this moment
                future.add_done_callback(lambda _: chunks.close())

    def close(self) -> None:
        """Begin nothing new."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _undo(future: Future[T], undo: Callable[[], None]) -> None:
    if future.exception() is None:
        try:
            undo()
        except StorageError as error:
            log.warning("a file that nobody wants stays until it is swept", error=error.message)
