"""Makes folders and files that only their owner may use, whatever the process's umask is.

A file is private from the moment it exists: changing its mode afterwards would leave others time to open it.
"""

from __future__ import annotations

import os
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
