"""The folder for files, which must stay the one it was at its first use.

When it was moved, or its disk is not mounted, the path leads to another folder or to none. New files would be lost
there, and existing ones would seem to be gone.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import structlog

from stable_audio_serve.artifacts.keys import OWNER_KEY
from stable_audio_serve.core.errors import StoreMovedError
from stable_audio_serve.core.private_files import make_private_folder

log = structlog.get_logger("stable_audio_serve.artifacts")

_RETRY_S = 5.0


class Folder:
    """One folder by its path."""

    def __init__(self, path: Path, *, may_make: bool) -> None:
        """Touches nothing yet. With `may_make` the first file creates a missing folder."""
        self.path = path
        self._may_make = may_make
        self._known: tuple[int, int] | None = None  # device and inode
        self._owner: bytes | None = None
        self._is_missed = False
        self._lock = threading.Lock()

    def require(self) -> None:
        """Raises StoreMovedError for another folder than before, or a missing one that may not be created."""
        with self._lock:
            self._require()

    def make(self) -> None:
        """`require`, and create the folder if it has never existed. Raises StoreMovedError, OSError."""
        with self._lock:
            if self._known is None and self._may_make:
                make_private_folder(self.path)
            self._require()

    def _require(self) -> None:
        found = self._identify()
        if self._known is None and found is not None:
            self._known, self._owner = found, self._read_owner()
        is_in_place = found == self._known if self._known else self._may_make
        if not is_in_place and found and self._owner and self._read_owner() == self._owner:
            self._known, is_in_place = found, True  # mounted again, or copied back from another disk
        if is_in_place == self._is_missed:  # changed since the last look: log it once
            self._is_missed = not is_in_place
            if is_in_place:
                log.warning("the folder of files is back in its place", folder=str(self.path))
            else:
                log.error("the folder of files was moved or replaced", folder=str(self.path))
        if not is_in_place:
            raise StoreMovedError("the folder of files was moved or replaced", retry_after_s=_RETRY_S)

    def _identify(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_dev, found.st_ino

    def _read_owner(self) -> bytes | None:
        try:
            return (self.path / OWNER_KEY).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
