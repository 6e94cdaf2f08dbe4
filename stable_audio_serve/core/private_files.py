"""Creates folders and files that only their owner can use, whatever the process's umask is.

Files are created private. Changing the mode later would let other users open them in between.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def make_private_folder(folder: Path) -> None:
    """Create the folder and its missing parents. Existing folders stay unchanged. Raises OSError."""
    if folder.is_dir():
        return
    make_private_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


def open_private(path: str | os.PathLike[str], flags: int) -> int:
    """An `opener` for `open` that creates private files. Returns the descriptor. Raises OSError."""
    return os.open(path, flags, 0o600)


def require_own_folder(folder: Path) -> None:
    """Raise PermissionError for a folder that other users own or can write to, or can replace in its parent."""
    own = folder.stat()
    if own.st_uid != os.geteuid() or own.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} belongs to or can be changed by another user")
    for parent in folder.resolve().parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:  # without the sticky bit any user can replace it
            raise PermissionError(f"every user can write to {parent}")
