"""SQLite as the job database: one file and its write-ahead log, shared by the processes of one machine.

A process can keep using an open file after the file was moved or deleted. The process's changes would be lost at the
next start, and a new connection would open or create another database. Therefore a transaction is refused if the paths
do not lead to the open files any more.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import sqlalchemy as sa
import structlog

from stable_audio_serve.core.errors import StoreMovedError
from stable_audio_serve.core.private_files import make_private_folder, open_private
from stable_audio_serve.jobs.store.errors import config_error

log = structlog.get_logger("stable_audio_serve.jobs")

_POOL_SIZE = 8
_OLDEST_SQLITE = (3, 35)  # the first version that supports RETURNING
_BUSY_TIMEOUT_S = 15.0
_BUSY_PAUSE_S = 0.001
_WAL_PAGES = 4000  # database pages (16 MiB) in the log before a checkpoint, which makes one writer wait
_RETRY_S = 5.0
_IS_COUNTED = "is_counted"  # key in `info` of SQLAlchemy's record of a connection

_Identity = tuple[int, int] | None  # a file's device and inode number; None if there is no file


class DatabaseFile:
    """Checks that the files that SQLite has open are still in place.

    These are the database file, which must always stay in place, and its write-ahead log while a connection is open.
    """

    def __init__(self, path: str, *, may_create: bool) -> None:
        """If `may_create` is true, opening a connection creates a missing file, but only before `adopt` is called."""
        self._path = os.path.abspath(path)
        self._may_create = may_create
        self._real = self._path
        self._first: tuple[_Identity, _Identity, str] | None = None
        self._opened: tuple[_Identity, ...] = ()
        self._num_open = 0
        self._was_moved = False
        self._lock = threading.Lock()

    def uri(self) -> str:
        """Return the URI with which to open the next connection. Raises StoreMovedError if the file is not in place."""
        is_first = self._first is None
        if is_first and self._may_create:
            make_private_folder(Path(self._path).parent)
            # The file is private. SQLite gives its log files the same permissions.
            if not os.path.exists(self._path):
                os.close(open_private(self._path, os.O_WRONLY | os.O_CREAT))
        elif is_first:
            self._require_in_place(_identify(self._path, may_be_empty=False) is not None)
        else:
            self._require_in_place(_locate(self._path) == self._first)
        if self._num_open:
            self.require()
        return f"file:{quote(self._path)}?mode=rw"

    def uri_without_log(self) -> str:
        """Return a URI with which SQLite reads only the database file, without locks and without the log.

        SQLite then sees the database as it was at the last checkpoint.
        """
        self.require()
        return f"file:{quote(self._path)}?mode=ro&immutable=1"

    def opened(self) -> None:
        """Count an open connection. Call this after its first read: SQLite creates the log at that time."""
        with self._lock:
            self._num_open += 1
            if self._num_open == 1:
                self._real = os.path.realpath(self._path)  # SQLite's log is in the folder of this resolved path
                self._opened = self._identify_files()

    def adopt(self) -> None:
        """Accept the open file as the database. From now on, no other file is opened or created."""
        self._first = _locate(self._real)

    def closed(self) -> None:
        """Count a closed connection. SQLite removes the log when the last connection of all processes is closed."""
        with self._lock:
            self._num_open -= 1

    def require(self) -> None:
        """Raise StoreMovedError if the paths do not lead to the open files any more."""
        self._require_in_place(self._identify_files() == self._opened)

    def _identify_files(self) -> tuple[_Identity, ...]:
        """Return the identities of the files that are now at the paths of the open files.

        This is ten times as fast as resolving the configured path again. `lstat` detects that the database file was
        replaced by a link. SQLite would then look for the log in another folder.
        """
        real = self._real
        file = _identify(real, look=os.lstat, may_be_empty=False)
        found = (file, _identify(f"{real}-wal"), _identify(f"{real}-shm"))
        return found if real == self._path else (*found, _identify(self._path))

    def _require_in_place(self, is_in_place: bool) -> None:
        if is_in_place == self._was_moved:  # log only when this has changed since the last check
            self._was_moved = not is_in_place
            if is_in_place:
                log.warning("the job database is back in its place", file=self._path)
            else:
                log.error("the job database was moved or replaced; jobs fail until it is back", file=self._path)
        if not is_in_place:
            raise StoreMovedError("the file of the job database was moved or replaced", retry_after_s=_RETRY_S)


def _locate(path: str) -> tuple[_Identity, _Identity, str]:
    """Return the identity of a file, the identity of its real folder, and its real name.

    SQLite derives the path of its log from the real folder and name.
    """
    folder, name = os.path.split(os.path.realpath(path))
    return _identify(path, may_be_empty=False), _identify(folder), name


def _identify(path: str, *, look: Callable[[str], os.stat_result] = os.stat, may_be_empty: bool = True) -> _Identity:
    try:
        found = look(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if found.st_size or may_be_empty else None


def create_engine_without_log(file: DatabaseFile) -> sa.Engine:
    """Return an SQLAlchemy engine that reads the database file without its log, each time with a new connection."""

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(file.uri_without_log(), uri=True)
        # The file can be shorter than its header says: during a checkpoint, and until the next one, because they omit
        # pages that changed after a reader began. SQLite calls such a file malformed, except with this option.
        connection.execute("PRAGMA writable_schema = ON")
        return connection

    return sa.create_engine("sqlite://", creator=connect, poolclass=sa.NullPool)


def create_engine(url: sa.URL, *, may_create: bool) -> tuple[sa.Engine, DatabaseFile]:
    """Return an SQLAlchemy engine for the file in `url`, and the object that checks the file. Raises ConfigError.

    If `may_create` is true, the first connection creates a missing file.
    """
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise config_error(
            f"SQLite {sqlite3.sqlite_version} is too old, {'.'.join(map(str, _OLDEST_SQLITE))} is needed"
        )
    engine = sa.create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_S}, pool_size=_POOL_SIZE)
    file = DatabaseFile(url.database or "", may_create=may_create)

    @sa.event.listens_for(engine, "do_connect")
    def _open(_: Any, __: Any, args: list[Any], options: dict[str, Any]) -> None:
        args[0], options["uri"] = file.uri(), True

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, record: Any) -> None:
        connection.isolation_level = None  # only `_begin` begins transactions, not the sqlite3 module
        # The first switch to the log needs exclusive access, for which SQLite does not wait.
        _retry_while_busy(connection, "PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_WAL_PAGES}")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        file.opened()
        record.info[_IS_COUNTED] = True

    @sa.event.listens_for(engine, "close")
    def _forget(_: Any, record: Any) -> None:
        if record.info.pop(_IS_COUNTED, False):
            file.closed()

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        file.require()
        options = connection.get_execution_options()
        if not options.get("reading"):
            driver_connection = cast(sqlite3.Connection, connection.connection.driver_connection)
            _begin_writing(driver_connection, is_durable=options.get("is_durable", True))

    return engine, file


def _begin_writing(connection: sqlite3.Connection, *, is_durable: bool) -> None:
    """Begin a transaction for writing, and wait for other writers by trying again at constant intervals.

    SQLite can wait itself, but its intervals grow, so that a writer that began to wait later would often be first.
    """
    connection.execute(f"PRAGMA synchronous = {'FULL' if is_durable else 'NORMAL'}")
    connection.execute("PRAGMA busy_timeout = 0")
    try:
        _retry_while_busy(connection, "BEGIN IMMEDIATE")
    finally:
        connection.execute(f"PRAGMA busy_timeout = {round(_BUSY_TIMEOUT_S * 1000)}")


def _retry_while_busy(connection: sqlite3.Connection, statement: str) -> None:
    """Repeat a statement while the database is busy. Raises sqlite3.OperationalError after `_BUSY_TIMEOUT_S`."""
    give_up_at = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute(statement)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > give_up_at:
                raise
            time.sleep(_BUSY_PAUSE_S)
        else:
            return
