"""Create folders and files that only their owner can use, whatever the process's umask is, and temporary files.

A file is created with its final permissions. If the permissions were changed after the creation, other users could open
the file in between.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO, cast

from stable_audio_serve.core.errors import StorageFullError

_CHUNK_BYTES = 1_048_576


def make_private_folder(folder: Path) -> None:
    """Create a folder and its missing parents for their owner only. Existing folders stay unchanged. Raises OSError."""
    if folder.is_dir():
        return
    make_private_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


def open_private(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file. If it does not exist and `flags` create it, only its owner can read and write it. Raises OSError.

    Pass this function to the built-in `open` as `opener`.
    """
    return os.open(path, flags, 0o600)


def open_temporary() -> BinaryIO:
    """Open a new temporary file, which is deleted when it is closed. Raises StorageFullError if there is no room."""
    with needing_room():
        return cast(BinaryIO, tempfile.TemporaryFile())


@contextmanager
def needing_room(errors: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    """Raise StorageFullError in place of one of `errors` of a temporary file in this context."""
    try:
        yield
    except errors as error:  # FileNotFoundError if no folder for temporary files can be used
        raise StorageFullError("there is no room for temporary files") from error


@contextmanager
def temporary_file() -> Iterator[BinaryIO]:
    """As `open_temporary`. The file is closed at the end of the context."""
    file = open_temporary()
    try:
        yield file
    finally:
        with suppress(OSError):  # on a full disk there is no room for what is still in the file's buffer
            file.close()


def read_chunks(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the content of a file from its start."""
    file.seek(0)
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk


def require_own_folder(folder: Path) -> None:
    """Raise PermissionError if another user owns the folder, can write to it, or can replace it in its parent."""
    own = folder.stat()
    if own.st_uid != os.geteuid() or own.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} belongs to or can be changed by another user")
    for parent in folder.resolve().parents:
        mode = parent.stat().st_mode
        # In a parent folder that everyone can write to, everyone can rename its entries, unless the sticky bit is set.
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise PermissionError(f"every user can write to {parent}")
