"""The interface of file stores, and the code that they share.

Each store has its own worker threads, so that a slow disk or service delays only its own callers. Files are verified
while they are read. `artifacts.keys` creates all keys; clients cannot choose them.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, TypeVar

import structlog

from stable_audio_serve.core.errors import DamagedFileError, StorageError
from stable_audio_serve.core.generation import MadeOn
from stable_audio_serve.core.ids import ArtifactKey
from stable_audio_serve.core.metrics import Metrics, NullMetrics
from stable_audio_serve.core.sound import ClipFacts

log = structlog.get_logger("stable_audio_serve.artifacts")

T = TypeVar("T")

MAX_VERIFIED_PART = 1_048_576  # parts of files with at most this many bytes are verified
READ_BYTES = 262_144  # size of a chunk; each download by a slow client holds up to three
# Work that no thread has begun after this time is refused. A hanging service keeps each thread busy for up to 100 s.
_BEGIN_WITHIN_S = 60.0
_DISCARDED_AT_ONCE = 8  # more would wait in the queue of the threads, before the calls of clients
_WIND_DOWN_S = 1.0  # a cancelled caller waits at most this long for the removal of the file that it was writing

BackendName = Literal["local", "s3"]

# The largest number of files that one call of `list_folder` returns.
MAX_LISTED = 1000

# The largest file that a probe writes, in bytes: large enough to exceed a quota, too small to fill the disk.
PROBE_BYTES = 4_194_304

# A function that returns the chunks of a file from its start. Every call yields the same bytes.
Chunks = Callable[[], Iterable[bytes]]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A stored file. It does not change after it was written.

    `sha256` is hexadecimal. `clips` has the measurements of the audio clips in the file, or is empty if unknown.
    `made_on` describes the device that generated the clips, or is None if unknown.
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
    """An entry of a store's list of files. `modified_at` is Unix time in seconds."""

    key: ArtifactKey
    modified_at: float


@dataclass(frozen=True, slots=True)
class ObjectPage:
    """Some files of a folder.

    Pass `next_cursor` as `cursor` to get the next page. On the last page, `next_cursor` is None.
    """

    objects: tuple[StoredObject, ...]
    next_cursor: str | None


class ArtifactStore(ABC):
    """Stores files. A file is either complete or absent.

    Each kind of store implements the abstract methods, which block.
    """

    backend_name: ClassVar[BackendName]  # the kind of store, for clients

    def __init__(self, threads: StoreThreads, *, metrics: Metrics | None) -> None:
        """Create the store without any I/O. Its work runs on `threads`."""
        self._threads = threads
        self._metrics = metrics or NullMetrics()

    async def put(self, key: ArtifactKey, chunks: Chunks, *, media_type: str, file_name: str) -> StoredFile:
        """Write a file. Raises StorageError, StorageFullError.

        After an error or a cancellation the incomplete file is removed. If that fails, the sweeper removes it later.
        """

        def put(stop: threading.Event) -> StoredFile:
            return self._put(key, chunks, stop=stop, media_type=media_type, file_name=file_name)

        return await self._threads.run(put, undo=partial(self._delete, key))

    def read(self, file: StoredFile) -> AsyncGenerator[bytes]:
        """Yield the file in chunks. The last chunk is yielded only after the SHA-256 of the whole file was checked.

        Raises FileNotFoundError before the first chunk if the file does not exist. Raises DamagedFileError instead of
        the last chunk if the SHA-256 is wrong. Raises StorageError.
        """
        return self._threads.stream(verified(file, self._read(file.key), metrics=self._metrics))

    def read_part(self, file: StoredFile, *, start: int, stop: int) -> AsyncGenerator[bytes]:
        """Yield the bytes [start, stop) of the file in chunks. Verified if the file has at most `MAX_VERIFIED_PART`.

        Raises the same errors as `read`, DamagedFileError if the file ends before `stop`.
        """
        read = partial(self._read, file.key)
        return self._threads.stream(part(file, read, start=start, stop=stop, metrics=self._metrics))

    async def delete(self, key: ArtifactKey) -> None:
        """Remove a file, if it exists. Raises StorageError."""
        await self._threads.call(partial(self._delete, key))

    async def discard(self, *keys: ArtifactKey) -> int:
        """Remove files, a few at a time. Returns how many were removed; the sweeper removes the others later."""
        num_removed = 0
        for start in range(0, len(keys), _DISCARDED_AT_ONCE):
            some = keys[start : start + _DISCARDED_AT_ONCE]
            failures = [each for each in await asyncio.gather(*map(self.delete, some), return_exceptions=True) if each]
            if failures:
                log.warning("files could not be deleted", number=len(failures), error=str(failures[0]))
            num_removed += len(some) - len(failures)
        return num_removed

    async def probe(self, num_bytes: int) -> None:
        """Check, at little cost, that a file of this size could be written now, and read. Raises StorageError."""
        await self._threads.call(partial(self._probe, num_bytes))

    async def close(self) -> None:
        """Stop accepting work."""
        self._threads.close()

    @abstractmethod
    def check(self) -> None:
        """Check the store: write a file and read it back, within ten seconds. Blocking.

        Raises ConfigError, which names the settings to change.
        """

    def url(self, file: StoredFile) -> str | None:
        """Return a link to the file that bypasses this server, or None if the store has no such links.

        Blocking. Raises StorageError.
        """
        return None

    def bucket_key(self, file: StoredFile) -> str | None:
        """Return the full key of the file in its bucket, or None if the store has no bucket."""
        return None

    def require_place(self) -> None:
        """Raise StoreMovedError if the folder of a local store was moved or replaced. Blocking."""
        return

    @abstractmethod
    def claim(self, owner: str) -> float | None:
        """Make `owner` the owner of the store if it has none. Blocking. Raises StorageError.

        Returns the Unix time in seconds at which `owner` became the owner. Files that are older than this time do not
        belong to `owner`. Returns None if the store has another owner.
        """

    @abstractmethod
    def fetch(self, key: ArtifactKey, *, max_bytes: int) -> bytes | None:
        """Return the content of a small file without checking its SHA-256, or None if there is no such file. Blocking.

        Raises StorageError, and DamagedFileError for a file above `max_bytes`.
        """

    @abstractmethod
    def list_folder(self, folder: str, *, cursor: str | None = None, limit: int = MAX_LISTED) -> ObjectPage:
        """Return the files directly in `folder`, except those with keys of other programs. Blocking.

        Raises StorageError.
        """

    @abstractmethod
    def sweep_unfinished(self, *, before: float) -> int:
        """Remove the incomplete files that are older than the Unix time `before`. Returns their number. Blocking.

        Raises StorageError.
        """

    @abstractmethod
    def _put(
        self, key: ArtifactKey, chunks: Chunks, *, stop: threading.Event, media_type: str, file_name: str
    ) -> StoredFile:
        """Write a file, see `put`. Raises StoppedError soon after `stop` is set."""

    @abstractmethod
    def _read(self, key: ArtifactKey, start: int = 0) -> Generator[bytes]:
        """Yield the bytes of a file from `start` on. Raises FileNotFoundError, StorageError."""

    @abstractmethod
    def _delete(self, key: ArtifactKey) -> None:
        """Remove a file, see `delete`."""

    @abstractmethod
    def _probe(self, num_bytes: int) -> None:
        """Write and remove a file of at most `PROBE_BYTES`, see `probe`. In a bucket, also read it."""


class StoppedError(Exception):
    """The work was stopped because its caller was cancelled."""


def until_stopped(chunks: Iterable[bytes], stop: threading.Event) -> Iterator[bytes]:
    """Yield `chunks` until `stop` is set, then raise StoppedError."""
    for chunk in chunks:
        if stop.is_set():
            raise StoppedError
        yield chunk


class StoreThreads:
    """Runs the blocking work of one store on its own threads. Log lines of the work have the caller's request id.

    `run`, `call` and `stream` raise StorageError if no thread is free in time.
    """

    def __init__(self, num_threads: int, *, name: str) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)

    async def run(self, work: Callable[[threading.Event], T], *, undo: Callable[[], None]) -> T:
        """Run `work` on a thread and return its result.

        If the caller is cancelled, the event that `work` received is set, so that `work` stops. If `work` completes
        anyway, `undo` runs.
        """
        stop = threading.Event()
        future = self._submit(partial(work, stop))
        try:
            return await self._result(future)
        except asyncio.CancelledError:
            stop.set()
            if not future.cancel():
                undoing = self._submit(partial(_undo, future, undo))
                await asyncio.wait([asyncio.wrap_future(undoing)], timeout=_WIND_DOWN_S)
            raise

    async def call(self, work: Callable[[], T]) -> T:
        """Run `work` on a thread and return its result. The work continues if the caller is cancelled."""
        return await self._result(self._submit(work))

    async def stream(self, chunks: Generator[bytes]) -> AsyncGenerator[bytes]:
        """Yield the items of `chunks`, which runs on a thread. Closes `chunks` even after errors and cancellations."""
        future: Future[bytes | None] | None = None
        try:
            while True:
                future = self._submit(partial(next, chunks, None))
                chunk = await self._result(future)
                if chunk is None:
                    return
                yield chunk
        finally:
            if future is not None:  # wait for the thread that may still run `chunks`
                future.add_done_callback(lambda _: chunks.close())

    def close(self) -> None:
        """Stop accepting work."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        return self._pool.submit(copy_context().run, work)

    @staticmethod
    async def _result(future: Future[T]) -> T:
        result = asyncio.wrap_future(future)
        try:
            await asyncio.wait({result}, timeout=_BEGIN_WITHIN_S)
            if future.cancel():
                raise StorageError("the artifact store is busy with slow calls")
            return await result
        finally:
            result.cancel()  # work that a thread has begun goes on, and asyncio does not report its error


def _undo(future: Future[T], undo: Callable[[], None]) -> None:
    if future.exception() is None:
        try:
            undo()
        except StorageError as error:
            log.warning("an abandoned file remains until the next sweep", error=error.message)


def verified(file: StoredFile, chunks: Generator[bytes], *, metrics: Metrics) -> Generator[bytes]:
    """Yield `chunks`. The last chunk is yielded only if all chunks together have the size and SHA-256 of `file`.

    Otherwise DamagedFileError is raised in place of the last chunk, so that a client that downloads the file notices
    the missing bytes. Of a file of up to `MAX_VERIFIED_PART` bytes, no chunk is yielded before.
    """
    digest = hashlib.sha256()
    num_bytes = 0
    is_small = file.num_bytes <= MAX_VERIFIED_PART
    held: deque[bytes] = deque()
    with closing(chunks):
        for chunk in chunks:
            digest.update(chunk)
            num_bytes += len(chunk)
            if num_bytes > file.num_bytes:
                break
            if held and not is_small:
                yield held.popleft()
            held.append(chunk)
    if num_bytes != file.num_bytes or digest.hexdigest() != file.sha256:
        raise _report_damaged(file, num_bytes=num_bytes, expected=file.num_bytes, metrics=metrics)
    yield from held


def part(
    file: StoredFile, read: Callable[[int], Generator[bytes]], *, start: int, stop: int, metrics: Metrics
) -> Generator[bytes]:
    """Yield the bytes [start, stop) of `file`. `read` yields the bytes of the file from an offset.

    A small file is read and verified as a whole. Of a larger one, only the part is read, and is not verified. Raises
    DamagedFileError.
    """
    if file.num_bytes <= MAX_VERIFIED_PART:
        yield b"".join(verified(file, read(0), metrics=metrics))[start:stop]
        return
    num_read = 0
    with closing(read(start)) as chunks:
        for chunk in chunks:
            yield chunk[: stop - start - num_read]
            num_read += len(chunk)
            if num_read >= stop - start:
                return
    raise _report_damaged(file, num_bytes=num_read, expected=stop - start, metrics=metrics)


def _report_damaged(file: StoredFile, *, num_bytes: int, expected: int, metrics: Metrics) -> DamagedFileError:
    log.error("a stored file is damaged", key=file.key, num_bytes=num_bytes, expected_num_bytes=expected)
    metrics.increment("damaged_files")
    return DamagedFileError("the stored file is damaged")


def require_size(data: bytes, max_bytes: int) -> bytes:
    """Return `data`. Raises DamagedFileError when it has more than `max_bytes`."""
    if len(data) > max_bytes:
        raise DamagedFileError(f"the stored file is larger than {max_bytes} bytes, the most allowed")
    return data
