"""Store files in one local folder. Each file is written under a temporary name, flushed to disk and then renamed.

After its first use, the path must keep leading to the same folder. If the folder is moved or its disk is unmounted, new
files would be lost and existing files would seem to be deleted. Calls raise StoreMovedError instead.
"""

from __future__ import annotations

import errno
import hashlib
import heapq
import os
import re
import secrets
import shutil
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from stable_audio_serve.artifacts.keys import FOLDERS, OWNER_KEY, QUALITY_FOLDER, is_ours, new_key
from stable_audio_serve.artifacts.store import (
    PROBE_BYTES,
    READ_BYTES,
    ArtifactStore,
    Chunks,
    ObjectPage,
    StoredFile,
    StoredObject,
    StoreThreads,
    require_size,
    until_stopped,
)
from stable_audio_serve.core.errors import ConfigError, StorageError, StorageFullError, StoreMovedError
from stable_audio_serve.core.failpoints import failpoint
from stable_audio_serve.core.ids import ArtifactKey
from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.core.private_files import make_private_folder, open_private

log = structlog.get_logger("stable_audio_serve.artifacts")

_NUM_THREADS = 8
_RETRY_S = 5.0
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_MAX_PARTS = 3
_MAX_LISTED = 100_000  # many, because each page reads the names of the whole folder
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{16}\.partial")


class Folder:
    """Detects that the folder at a path has been moved or replaced."""

    def __init__(self, path: Path, *, may_make: bool) -> None:
        """Remember the path without any I/O. If the folder is missing and `may_make` is true, `require` can make it."""
        self.path = path
        self._may_make = may_make
        self._known: tuple[int, int] | None = None  # device and inode
        self._owner: bytes | None = None
        self._is_missed = False
        self._lock = threading.Lock()

    def require(self, *, make: bool = False) -> None:
        """Raise StoreMovedError if the folder was moved or replaced, if it does not answer, or if it is missing and may
        not be created.

        If `make` is true, creates the folder before, unless this object has found it already. Then also raises OSError.
        """
        with self._lock:
            if make and self._may_make and self._known is None:
                make_private_folder(self.path)
            self._check()

    def _check(self) -> None:
        found = self._identify()
        if self._known is None and found is not None:
            self._known, self._owner = found, self._read_owner()
        is_in_place = found == self._known if self._known else self._may_make
        if not is_in_place and found and self._owner and self._read_owner() == self._owner:
            self._known, is_in_place = found, True  # the owner file is the same: the folder was remounted or copied
        if is_in_place == self._is_missed:  # log only changes, not every call
            self._is_missed = not is_in_place
            if is_in_place:
                log.warning("the files folder is back", folder=str(self.path))
            else:
                log.error("the files folder was moved or replaced", folder=str(self.path))
        if not is_in_place:
            raise StoreMovedError("the files folder was moved or replaced", retry_after_s=_RETRY_S)

    def _identify(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path)
        except OSError:  # missing, or on a network share that does not answer
            return None
        return found.st_dev, found.st_ino

    def _read_owner(self) -> bytes | None:
        try:
            return (self.path / OWNER_KEY).read_bytes()
        except OSError:
            return None


class LocalArtifacts(ArtifactStore):
    """Files in one folder, which must not be moved. `ArtifactStore` documents the methods."""

    backend_name = "local"

    def __init__(self, folder: Path, *, may_make: bool = True, metrics: Metrics | None = None) -> None:
        """Create the store without any I/O.

        If the folder is missing and `may_make` is true, it is created when the first file is stored.
        """
        super().__init__(StoreThreads(_NUM_THREADS, name="local-files"), metrics=metrics)
        self._folder = Folder(folder, may_make=may_make)

    def __str__(self) -> str:
        return f"folder {self._folder.path}"

    def check(self) -> None:
        key = new_key("uploads")
        try:
            self._write(self._path(key), lambda: [b"check"], stop=threading.Event())
            is_same = b"".join(self._read(key)) == b"check"
            self._delete(key)
        except StorageError as error:
            raise self._config_error(error.message) from error
        if not is_same:
            raise self._config_error("a file that was read back differs from what was written")

    def require_place(self) -> None:
        self._folder.require()

    def claim(self, owner: str) -> float | None:
        path = self._folder.path / OWNER_KEY
        draft = path.with_name(f".{OWNER_KEY}.{secrets.token_hex(8)}.partial")
        self._folder.require()
        with _storage_errors():
            if not path.exists():
                self._write(draft, lambda: [owner.encode()], stop=threading.Event())
                try:
                    os.link(draft, path)
                except FileExistsError:  # another process claimed the store first
                    pass
                except OSError:  # the file system has no hard links
                    with suppress(FileExistsError), path.open("xb") as file:
                        file.write(owner.encode())
                finally:
                    draft.unlink()
            return path.stat().st_mtime if path.read_bytes() == owner.encode() else None

    def fetch(self, key: ArtifactKey, *, max_bytes: int) -> bytes | None:
        path = self._path(key)
        self._folder.require()
        with _storage_errors(), suppress(FileNotFoundError), path.open("rb") as file:
            return require_size(file.read(max_bytes + 1), max_bytes)
        return None

    def list_folder(self, folder: str, *, cursor: str | None = None, limit: int = _MAX_LISTED) -> ObjectPage:
        self._folder.require()
        with _storage_errors():
            keys = (ArtifactKey(f"{folder}/{name}" if folder else name) for name in self._names(folder))
            found = heapq.nsmallest(limit, (key for key in keys if is_ours(key) and (cursor is None or key > cursor)))
            objects = tuple(item for item in map(self._describe, found) if item is not None)
        return ObjectPage(objects, found[-1] if len(found) == limit else None)

    def sweep_unfinished(self, *, before: float) -> int:
        self._folder.require()
        num_removed = 0
        with _storage_errors():
            for folder in (*FOLDERS, QUALITY_FOLDER):
                for name in filter(_PARTIAL.fullmatch, self._names(folder)):
                    path = self._folder.path / folder / name
                    with suppress(FileNotFoundError):  # its writer finished, or another process removed it
                        if path.stat().st_mtime <= before:
                            path.unlink()
                            num_removed += 1
        return num_removed

    def _put(
        self, key: ArtifactKey, chunks: Chunks, *, stop: threading.Event, media_type: str, file_name: str
    ) -> StoredFile:
        num_bytes, sha256 = self._write(self._path(key), chunks, stop=stop)
        return StoredFile(key, media_type, file_name, num_bytes, sha256)

    def _probe(self, num_bytes: int) -> None:
        key = new_key("uploads")
        path = self._path(key)
        self._folder.require()
        with _storage_errors():
            space = shutil.disk_usage(self._folder.path)
        num_bytes = min(num_bytes, space.total // 2)
        if space.free < num_bytes:
            raise StorageFullError("the disk is full")
        self._write(path, lambda: [bytes(min(num_bytes, PROBE_BYTES))], stop=threading.Event())
        self._delete(key)

    def _write(self, path: Path, chunks: Chunks, *, stop: threading.Event) -> tuple[int, str]:
        with _storage_errors():
            self._folder.require(make=True)
            return _write(path, chunks, stop=stop)

    def _read(self, key: ArtifactKey, start: int = 0) -> Generator[bytes]:
        path = self._path(key)
        self._folder.require()
        yield from _read(path, start)

    def _delete(self, key: ArtifactKey) -> None:
        path = self._path(key)
        self._folder.require()
        with _storage_errors():
            path.unlink(missing_ok=True)

    def _path(self, key: ArtifactKey) -> Path:
        parts = key.split("/")
        if len(parts) > _MAX_PARTS or not all(_PART.fullmatch(part) for part in parts):
            # Not an error of the client, because clients never choose keys.
            raise ValueError(f"not an artifact key: {key!r}")
        return self._folder.path.joinpath(*parts)

    def _names(self, folder: str) -> Iterator[str]:
        """Yield the names of the files in a folder. Yields nothing if the folder does not exist."""
        with suppress(FileNotFoundError), os.scandir(self._folder.path / folder) as entries:
            yield from (entry.name for entry in entries if entry.is_file(follow_symlinks=False))

    def _describe(self, key: ArtifactKey) -> StoredObject | None:
        try:
            found = self._path(key).stat()
        except FileNotFoundError:
            return None
        return StoredObject(key, found.st_mtime)

    def _config_error(self, problem: str) -> ConfigError:
        message = f"output_dir (STABLE_AUDIO_OUTPUT_DIR): {self._folder.path}: {problem}"
        return ConfigError(message, field="output_dir")


def _write(path: Path, chunks: Chunks, *, stop: threading.Event) -> tuple[int, str]:
    """Write a file and return its size in bytes and its SHA-256. Raises OSError, StoppedError."""
    digest = hashlib.sha256()
    num_bytes = 0
    partial_path = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.partial")
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with open(partial_path, "xb", opener=open_private) as file:
            for chunk in until_stopped(chunks(), stop):
                file.write(chunk)
                failpoint("mid_upload")
                digest.update(chunk)
                num_bytes += len(chunk)
            file.flush()
            os.fsync(file.fileno())
        partial_path.replace(path)
        try:
            _flush_folder(path.parent)
        except OSError:
            path.unlink()
            raise
    except BaseException:
        with suppress(OSError):
            partial_path.unlink(missing_ok=True)
        raise
    return num_bytes, digest.hexdigest()


def _read(path: Path, start: int) -> Generator[bytes]:
    try:
        # O_NONBLOCK: if the path is a named pipe, opening it would otherwise block until another process writes to it.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            file.seek(start)  # raises OSError for a named pipe
            while chunk := file.read(READ_BYTES):
                yield chunk
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _storage_error(error) from error


def _flush_folder(folder: Path) -> None:
    """Flush the folder's list of file names to disk. Otherwise a power failure may lose the name of a new file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _storage_errors() -> Iterator[None]:
    """Raise StorageError or StorageFullError in place of OSError."""
    try:
        yield
    except OSError as error:
        raise _storage_error(error) from error


def _storage_error(error: OSError) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFullError("the disk is full")
    return StorageError(f"a file cannot be stored or read: {error.strerror or 'I/O error'}", retry_after_s=_RETRY_S)
