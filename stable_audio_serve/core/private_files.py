"""Create folders and files that only their owner can use, whatever the process's umask is.

Files have their mode from the start. If it were changed after their creation, other users could open them in between.
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
    """Open a file that is private if it is created. Pass this function to `open` as `opener`. Raises OSError."""
    return os.open(path, flags, 0o600)


def require_own_folder(folder: Path) -> None:
    """Raise PermissionError if another user owns the folder, can write to it, or can replace it in its parent."""
    own = folder.stat()
    if own.st_uid != os.geteuid() or own.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} belongs to or can be changed by another user")
    for parent in folder.resolve().parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:  # without the sticky bit any user can replace the folder
            raise PermissionError(f"every user can write to {parent}")
