"""Worker threads of one store, so that a slow disk or service delays only those who use it."""

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
    """Work was stopped, and has left nothing behind."""


def until_stopped(chunks: Iterable[bytes], stop: threading.Event) -> Iterator[bytes]:
    """Yields `chunks` until `stop` is set. Raises StoppedError then."""
    for chunk in chunks:
        if stop.is_set():
            raise StoppedError
        yield chunk


class StoreThreads:
    """Runs blocking work so that cancelling its caller undoes it."""

    def __init__(self, num_threads: int, *, name: str) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)

    async def run(self, work: Callable[[threading.Event], T], *, undo: Callable[[], None]) -> T:
        """Returns what `work` returns.

        When the caller is cancelled the event is set, and work that ends nevertheless is undone.
        """
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
        """Returns what `work` returns. Work goes on when the caller is cancelled."""
        return await asyncio.wrap_future(self._pool.submit(work))

    async def stream(self, chunks: Generator[bytes]) -> AsyncGenerator[bytes]:
        """Yields `chunks`, each made on a thread. The generator is closed at the end in any case."""
        future: Future[bytes | None] | None = None
        try:
            while True:
                future = self._pool.submit(partial(next, chunks, None))
                chunk = await asyncio.wrap_future(future)
                if chunk is None:
                    return
                yield chunk
        finally:
            if future is not None:  # a thread may be inside the generator at this moment
                future.add_done_callback(lambda _: chunks.close())

    def close(self) -> None:
        """Start no new work."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _undo(future: Future[T], undo: Callable[[], None]) -> None:
    if future.exception() is None:
        try:
            undo()
        except StorageError as error:
            log.warning("a file that nobody wants stays until it is swept", error=error.message)
