"""Makes folders and files that only their owner may use, whatever the process's umask is.

A file is private from the moment it exists: changing its mode afterwards would leave others time to open it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def make_private_folder(folder: Path) -> None:
    """Make the folder and its missing parents; existing ones are left as they are. Raises OSError."""
    if folder.is_dir():
        return
    make_private_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


def open_private(path: str | os.PathLike[str], flags: int) -> int:
    """An `opener` for `open`, for files that may not exist yet. Returns the descriptor. Raises OSError."""
    return os.open(path, flags, 0o600)


def require_own_folder(folder: Path) -> None:
    """Raise PermissionError for a folder in which others could put files: not this user's own, or open to them."""
    own = folder.stat()
    if own.st_uid != os.geteuid() or own.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} is not this user's alone")
    for parent in folder.resolve().parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:  # without that bit anybody may put another in its place
            raise PermissionError(f"everybody may write to {parent}")
