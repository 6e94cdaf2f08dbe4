"""The interface of file stores, and their shared parts.

Each store has its own worker threads, so that a slow disk or service delays only its own callers. Files are verified
while they are read. Only `artifacts.keys` creates keys, never clients.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, TypeVar

import structlog

from stable_audio_serve.core.errors import DamagedFileError, StorageError
from stable_audio_serve.core.generation import MadeOn
from stable_audio_serve.core.ids import ArtifactKey
from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.core.sound import ClipFacts

log = structlog.get_logger("stable_audio_serve.artifacts")

T = TypeVar("T")

_WIND_DOWN_S = 1.0  # time that a cancelled caller waits for the undo, which continues after it

BackendName = Literal["local", "s3"]

# Most files that one call of `list_folder` returns.
MAX_LISTED = 1000

# Most bytes that a probe writes: enough to hit a quota, too few to fill the disk for others.
PROBE_BYTES = 4_194_304

# Returns the chunks of a file from its start. May be called several times and always yields the same bytes.
Chunks = Callable[[], Iterable[bytes]]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A stored file, unchanged since it was put. `sha256` is hexadecimal. `clips` are measurements of its audio and
    `made_on` is the device that generated it, both if known.
    """

    key: ArtifactKey
    media_type: str
    file_name: str
    num_bytes: int
    sha256: str
    clips: tuple[ClipFacts, ...] = ()
    made_on: MadeOn | None = None


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A file found under a key; `modified_at` is Unix time in seconds."""

    key: ArtifactKey
    num_bytes: int
    modified_at: float


@dataclass(frozen=True, slots=True)
class ObjectPage:
    """Some objects of a folder. `next_cursor` leads to the next page, None on the last one."""

    objects: tuple[StoredObject, ...]
    next_cursor: str | None


class ArtifactStore(Protocol):
    """Stores files. A file is either complete or absent."""

    @property
    def backend_name(self) -> BackendName:
        """The kind of store, as clients see it."""
        ...

    async def put(self, key: ArtifactKey, chunks: Chunks, *, media_type: str, file_name: str) -> StoredFile:
        """Write a file. Raises StorageError, StorageFullError. Leaves nothing behind on an error or a cancellation.

        The sweeper removes what cannot be removed at that moment.
        """
        ...

    def read(self, file: StoredFile) -> AsyncGenerator[bytes]:
        """Returns the file in chunks. Yields the last chunk only if the whole file matches its digest.

        Raises FileNotFoundError before the first chunk when the file does not exist, StorageError, DamagedFileError.
        """
        ...

    async def delete(self, key: ArtifactKey) -> None:
        """Remove a file. A missing file is no error. Raises StorageError."""
        ...

    async def probe(self, num_bytes: int) -> None:
        """Check, at little cost, whether a file of this size could be written now. Raises StorageError if not.

        For a file larger than the store could ever hold, checks for some free space only.
        """
        ...

    async def close(self) -> None:
        """Stop accepting work."""
        ...

    def check(self) -> None:
        """Write a file and read it back, within ten seconds. Blocking. Raises ConfigError naming the wrong settings."""
        ...

    def url(self, file: StoredFile) -> str | None:
        """Returns a link that bypasses this server, None if there is none. Blocking. Raises StorageError."""
        ...

    def bucket_key(self, file: StoredFile) -> str | None:
        """Returns the full key of the file in its bucket, None without a bucket."""
        ...

    def require_place(self) -> None:
        """Raise StoreMovedError when this process can see that the store was moved or replaced. Blocking."""
        ...

    def claim(self, owner: str) -> float | None:
        """Claim the store for `owner` unless it has an owner. Returns the time of the claim, Unix seconds. Blocking.

        Returns None when the store has another owner. Files from before the claim do not belong to the owner. Raises
        StorageError.
        """
        ...

    def fetch(self, key: ArtifactKey, *, max_bytes: int) -> bytes | None:
        """Returns a small file without checking a digest, None if it does not exist. Blocking.

        Raises StorageError, and DamagedFileError for a file above `max_bytes`.
        """
        ...

    def list_folder(self, folder: str, *, cursor: str | None = None, limit: int = MAX_LISTED) -> ObjectPage:
        """Returns the files directly in `folder`, without foreign keys. Blocking. Raises StorageError."""
        ...

    def sweep_unfinished(self, *, before: float) -> int:
        """Remove unfinished files of dead writers from before this Unix time. Returns their number. Blocking.

        Raises StorageError.
        """
        ...


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

        If the caller is cancelled, sets the stop event of `work`. Work that finishes anyway is undone.
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


def verified(file: StoredFile, chunks: Generator[bytes], *, metrics: Metrics) -> Generator[bytes]:
    """Yields `chunks`. Yields the last one only if the whole matches the size and SHA-256 of `file`.

    Otherwise raises DamagedFileError before the announced length is reached, so that every reader notices.
    """
    digest = hashlib.sha256()
    num_bytes = 0
    held = b""
    with closing(chunks):
        for chunk in chunks:
            digest.update(chunk)
            num_bytes += len(chunk)
            if num_bytes > file.num_bytes:
                break
            if held:
                yield held
            held = chunk
    if num_bytes != file.num_bytes or digest.hexdigest() != file.sha256:
        log.error("a stored file is damaged", key=file.key, num_bytes=num_bytes, expected_num_bytes=file.num_bytes)
        metrics.increment("damaged_files")
        raise DamagedFileError("the stored file is damaged")
    if held:
        yield held


def require_size(data: bytes, max_bytes: int) -> bytes:
    """Returns `data`. Raises DamagedFileError when it is larger."""
    if len(data) > max_bytes:
        raise DamagedFileError(f"the stored file is larger than {max_bytes} bytes, the most allowed")
    return data
