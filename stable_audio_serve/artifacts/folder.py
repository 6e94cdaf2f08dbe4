"""Checks that the folder for files stays the same folder after its first use.

If the folder was moved, or its disk is not mounted, the path leads to another folder or to nothing. New files would be
lost there, and existing files would seem to be deleted.
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
    """One folder, found by its path."""

    def __init__(self, path: Path, *, may_make: bool) -> None:
        """Does no I/O. With `may_make` the first file creates a missing folder."""
        self.path = path
        self._may_make = may_make
        self._known: tuple[int, int] | None = None  # device and inode
        self._owner: bytes | None = None
        self._is_missed = False
        self._lock = threading.Lock()

    def require(self) -> None:
        """Raise StoreMovedError for a folder other than before, or a missing one that may not be created."""
        with self._lock:
            self._require()

    def make(self) -> None:
        """Like `require`, but creates the folder if it has never existed. Raises StoreMovedError, OSError."""
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
            self._known, is_in_place = found, True  # the same owner: mounted again, or copied back
        if is_in_place == self._is_missed:  # log each change once
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
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_dev, found.st_ino

    def _read_owner(self) -> bytes | None:
        try:
            return (self.path / OWNER_KEY).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
