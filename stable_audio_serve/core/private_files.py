"""Folders and files that only their owner may use, made so whatever the process's umask allows others.

A file is private from the moment it exists: changing it afterwards would leave a time in which others can open it.
"""

from __future__ import annotations

import os
from pathlib import Path


def make_private_folder(folder: Path) -> None:
    """Make the folder and the missing ones above it; one that is there stays as it is. Raises OSError."""
    if folder.is_dir():
        return
    make_private_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


def open_private(path: str | os.PathLike[str], flags: int) -> int:
    """The `opener` of `open` for files that may have to be made. Raises OSError."""
    return os.open(path, flags, 0o600)
