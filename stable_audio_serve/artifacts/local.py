"""Files in one local folder: written beside their place, flushed to the disk, then renamed into it."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import secrets
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from pathlib import Path

from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.core.failpoints import failpoint

_CHUNK_BYTES = 1_048_576
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_MAX_PARTS = 3


class LocalArtifacts:
    """An `ArtifactStore` below one folder, which is made when the first file is kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def put(self, key: str, chunks: Iterable[bytes], *, media_type: str, file_name: str) -> StoredFile:
        """Write a file. Raises StorageError; then, and when cancelled, nothing is left behind."""
        path = self._path(key)
        writing = asyncio.create_task(asyncio.to_thread(_write, path, chunks))
        try:
            num_bytes, sha256 = await asyncio.shield(writing)
        except asyncio.CancelledError:
            with suppress(StorageError):
                await writing
                await self.delete(key)
            raise
        return StoredFile(key, media_type, file_name, num_bytes, sha256)

    async def read(self, key: str) -> AsyncIterator[bytes]:
        """The file in chunks of 1 MiB. Raises FileNotFoundError before the first chunk when it is gone."""
        file = await asyncio.to_thread(self._path(key).open, "rb")
        with file:
            while chunk := await asyncio.to_thread(file.read, _CHUNK_BYTES):
                yield chunk

    async def delete(self, key: str) -> None:
        """Remove a file; it is no error when it is gone already. Raises StorageError."""
        try:
            await asyncio.to_thread(self._path(key).unlink, missing_ok=True)
        except OSError as error:
            raise _storage_error(error) from error

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if len(parts) > _MAX_PARTS or not all(_PART.fullmatch(part) for part in parts):
            raise ValueError(f"not an artifact key: {key!r}")  # keys are ours: this is a bug, not a bad request
        return self._folder.joinpath(*parts)


def _write(path: Path, chunks: Iterable[bytes]) -> tuple[int, str]:
    """Size and SHA-256 of what was written."""
    digest = hashlib.sha256()
    num_bytes = 0
    partial = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
                failpoint("mid_upload")
                digest.update(chunk)
                num_bytes += len(chunk)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise _storage_error(error) from error
    return num_bytes, digest.hexdigest()


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)  # only then does the new name survive a power cut
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _storage_error(error: OSError) -> StorageError:
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return StorageError("the disk is full" if is_full else f"a file could not be kept: {error.strerror or 'I/O error'}")
