"""Worker threads of one store, so that a slow disk or service delays only its own callers."""

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

_WIND_DOWN_S = 1.0  # time that a cancelled caller waits for the undo, which continues after it


class StoppedError(Exception):
    """The work was stopped and left nothing behind."""


def until_stopped(chunks: Iterable[bytes], stop: threading.Event) -> Iterator[bytes]:
    """Yields `chunks` until `stop` is set, then raises StoppedError."""
    for chunk in chunks:
        if stop.is_set():
            raise StoppedError
        yield chunk


class StoreThreads:
    """Runs blocking work on threads. Cancelling the caller undoes the work."""

    def __init__(self, num_threads: int, *, name: str) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)

    async def run(self, work: Callable[[threading.Event], T], *, undo: Callable[[], None]) -> T:
        """Returns the result of `work`.

        When the caller is cancelled, sets the event. Work that finishes anyway is undone.
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
        """Returns the result of `work`. The work continues when the caller is cancelled."""
        return await asyncio.wrap_future(self._pool.submit(work))

    async def stream(self, chunks: Generator[bytes]) -> AsyncGenerator[bytes]:
        """Yields `chunks`, each produced on a thread. Always closes the generator at the end."""
        future: Future[bytes | None] | None = None
        try:
            while True:
                future = self._pool.submit(partial(next, chunks, None))
                chunk = await asyncio.wrap_future(future)
                if chunk is None:
                    return
                yield chunk
        finally:
            if future is not None:  # a thread may still be inside the generator
                future.add_done_callback(lambda _: chunks.close())

    def close(self) -> None:
        """Stop accepting work."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _undo(future: Future[T], undo: Callable[[], None]) -> None:
    if future.exception() is None:
        try:
            undo()
        except StorageError as error:
            log.warning("an abandoned file remains until the next sweep", error=error.message)
