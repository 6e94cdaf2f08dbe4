"""The seam to the places for files, and what these share: worker threads of their own, so that a slow disk or service
delays only its own users, and the check of files while they are read.

Keys are made by `artifacts.keys`, never by clients.
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

_WIND_DOWN_S = 1.0  # how long a cancelled caller waits for its work to be undone; it is undone in any case

BackendName = Literal["local", "s3"]

# How many files one call of `list_folder` returns at most.
MAX_LISTED = 1000

# What a probe writes at most: enough to run into a limit, too little to push others into it.
PROBE_BYTES = 4_194_304

# Returns the pieces of a file from its start. It may be called more than once, and the bytes are always the same.
Chunks = Callable[[], Iterable[bytes]]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file at rest, unchanged since it was put. `sha256` is hexadecimal; `clips` has the facts of its audio and
    `made_on` where a model made it, if known.
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
    """Some of the objects of a folder; `next_cursor` leads to the others, if there are any."""

    objects: tuple[StoredObject, ...]
    next_cursor: str | None


class ArtifactStore(Protocol):
    """Stores files. A file is either there in full or not there at all."""

    @property
    def backend_name(self) -> BackendName:
        """The kind of store, as clients see it."""
        ...

    async def put(self, key: ArtifactKey, chunks: Chunks, *, media_type: str, file_name: str) -> StoredFile:
        """Write a file. Raises StorageError, StorageFullError; then, and when cancelled, nothing is left behind.

        The sweeper removes what cannot be removed at that moment.
        """
        ...

    def read(self, file: StoredFile) -> AsyncGenerator[bytes]:
        """Returns the file in chunks. The last one comes only when the whole matches the file that was put.

        Raises FileNotFoundError before the first chunk when it is gone, StorageError, DamagedFileError.
        """
        ...

    async def delete(self, key: ArtifactKey) -> None:
        """Remove a file; it is no error when it is gone already. Raises StorageError."""
        ...

    async def probe(self, num_bytes: int) -> None:
        """Check, at little cost, whether a file of that size could be written now. Raises StorageError if not.

        Where it could never fit, some free room is enough.
        """
        ...

    async def close(self) -> None:
        """Start no new work."""
        ...

    def check(self) -> None:
        """Write a file and read it back, within ten seconds. Blocking. Raises ConfigError naming the wrong settings."""
        ...

    def url(self, file: StoredFile) -> str | None:
        """Returns a link that needs no server of ours, None if there is none. Blocking. Raises StorageError."""
        ...

    def bucket_key(self, file: StoredFile) -> str | None:
        """Returns the whole key of the file in its bucket, None where there is no bucket."""
        ...

    def require_place(self) -> None:
        """Raises StoreMovedError when files are not where they were, as far as this process can see. Blocking."""
        ...

    def claim(self, owner: str) -> float | None:
        """Claim it for owner if unclaimed. Returns when, in Unix seconds, or None if another's. Blocking.

        Files from before the claim are not the owner's. Raises StorageError.
        """
        ...

    def fetch(self, key: ArtifactKey, *, max_bytes: int) -> bytes | None:
        """Returns a small file without a known digest, None if there is none. Blocking.

        Raises StorageError, DamagedFileError for a larger one.
        """
        ...

    def list_folder(self, folder: str, *, cursor: str | None = None, limit: int = MAX_LISTED) -> ObjectPage:
        """Returns the files directly in a folder of `keys` whose keys are ours. Blocking. Raises StorageError."""
        ...

    def sweep_unfinished(self, *, before: float) -> int:
        """Remove files that dead writers left unfinished before this Unix time. Returns how many. Blocking.

        Raises StorageError.
        """
        ...


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


def verified(file: StoredFile, chunks: Generator[bytes], *, metrics: Metrics) -> Generator[bytes]:
    """Yields `chunks`, the last one only if all together match the size and SHA-256 of `file`.

    Raises DamagedFileError if they do not, before the promised length is reached, so that every reader notices.
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
        raise DamagedFileError(f"the stored file is larger than {max_bytes} bytes, which none of its kind is")
    return data
