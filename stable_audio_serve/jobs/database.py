"""Transactions on the tables of jobs, on SQLite or PostgreSQL. Blocking: for worker threads."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from stable_audio_serve.core.private_files import make_private_folder, open_private
from stable_audio_serve.jobs.faults import at_start, at_work, config_error
from stable_audio_serve.jobs.migrations.upgrade import upgrade
from stable_audio_serve.jobs.tables import JOBS

_POOL_SIZE = 8
_POOL_OVERFLOW = 8
_POOL_TIMEOUT_S = 10.0

_OLDEST_SQLITE = (3, 35)  # the first that says RETURNING
_BUSY_TIMEOUT_S = 15.0
_BUSY_PAUSE_S = 0.001
_WAL_PAGES = 4000  # 16 MiB between two checkpoints, each of which makes one writer wait

# What psycopg is told unless the URL says otherwise: seconds, the last in milliseconds. It notices when the server
# vanishes without a word.
_CONNECT = {
    **{"connect_timeout": 5, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3},
    "tcp_user_timeout": 20_000,
}
_SESSION = {
    # It gives up on what takes longer, in milliseconds; and a process frozen in a transaction loses its locks.
    "statement_timeout": 30_000,
    "lock_timeout": 15_000,
    "idle_in_transaction_session_timeout": 10_000,
    # A queue fills faster than statistics are renewed. So plans made for a short one are not kept, and what its
    # statistics take for a few rows is not sorted: every query has an index in its own order.
    "plan_cache_mode": "force_custom_plan",
    "enable_sort": "off",
    "jit": "off",
}


def database_url(url: str | None, folder: Path) -> sa.URL:
    """The configured database, or SQLite in `folder`. Raises ConfigError for what cannot be used."""
    if url is None:
        return sa.URL.create("sqlite", database=str(folder / "jobs.db"))
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError) as error:
        raise config_error("not a database URL") from error
    kind = parsed.drivername.partition("+")[0]
    if kind == "sqlite" and parsed.database and parsed.database != ":memory:" and not parsed.query:
        return parsed.set(drivername="sqlite")
    if kind in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    raise config_error("only SQLite files (sqlite:////path/to/jobs.db) and PostgreSQL (postgresql://...) can be used")


class Database:
    """Transactions on the tables, which are brought up to date before the first one.

    `now` is the time, Unix seconds, as SQL: the server's where there is one, because machines' clocks differ.
    """

    def __init__(self, url: sa.URL, *, now: Callable[[], float] | None = None) -> None:
        """Touches nothing yet. `now` gives Unix time in seconds; unset = the clock that all who share the tables do.

        Raises ConfigError when what the database needs is not installed.
        """
        self.url = url
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self.engine = _create_sqlite(url) if self.is_sqlite else _create_postgresql(url)
        self._reader = self.engine.execution_options(reading=True)
        if not self.is_sqlite:  # one statement needs neither a BEGIN before nor a ROLLBACK after it
            self._reader = self._reader.execution_options(isolation_level="AUTOCOMMIT")
        self.now = _server_time() if now is None and not self.is_sqlite else _time_of(now or time.time)
        self._lock = threading.Lock()
        self._is_ready = False

    def __str__(self) -> str:
        if self.is_sqlite:
            return f"SQLite {self.url.database}"
        return f"PostgreSQL {self.url.host or ''}{f':{self.url.port}' if self.url.port else ''}/{self.url.database}"

    def insert(self, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
        """An INSERT that can say ON CONFLICT."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction; on SQLite no other writer overlaps it. Raises StorageError."""
        with at_work():
            self._make_ready()
            with self.engine.begin() as connection:
                yield connection

    @contextmanager
    def writing_alone(self, lock: int) -> Iterator[sa.Connection]:
        """A transaction that no other one with the same number overlaps. Raises StorageError."""
        with self.writing() as connection:
            if not self.is_sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(lock)))
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection that waits for no writer; each statement sees what is committed by then. Raises StorageError."""
        with at_work():
            self._make_ready()
            with self._reader.connect() as connection:
                yield connection

    def prepare(self) -> None:
        """Make or upgrade the tables.

        Raises ConfigError, with the reason, when that is not possible: no server, no access, tables of a newer version.
        """
        with at_start(self):
            self._make_ready()

    def check_writable(self) -> None:
        """Raise ConfigError, with the reason, when rows can only be read: a standby, or a user without rights."""
        with at_start(self), self.engine.begin() as connection:
            connection.execute(sa.delete(JOBS).where(sa.false()))

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    def _make_ready(self) -> None:
        if self._is_ready:
            return
        with self._lock:
            if not self._is_ready:
                with self.engine.begin() as connection:  # looking and changing in one: other processes start too
                    upgrade(connection)
                self._is_ready = True


def _server_time() -> sa.ColumnElement[float]:
    return sa.cast(sa.extract("epoch", sa.func.statement_timestamp()), sa.Double)


def _time_of(clock: Callable[[], float]) -> sa.ColumnElement[float]:
    """Asked whenever a statement with it is executed."""
    return sa.bindparam("now", callable_=clock, type_=sa.Double)


def _create_postgresql(url: sa.URL) -> sa.Engine:
    try:
        engine = sa.create_engine(
            url,
            isolation_level="READ COMMITTED",  # what the compare-and-sets of `transitions` are made for
            connect_args={name: value for name, value in _CONNECT.items() if name not in url.query},
            pool_pre_ping=True,  # the server may have been restarted
            pool_size=_POOL_SIZE,
            max_overflow=_POOL_OVERFLOW,
            pool_timeout=_POOL_TIMEOUT_S,
        )
    except ImportError as error:
        raise config_error("PostgreSQL needs psycopg: pip install 'stable-audio-serve[postgres]'") from error

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, _: Any) -> None:
        connection.autocommit = True
        calls = (f"set_config('{name}', '{value}', false)" for name, value in _SESSION.items())
        connection.execute(f"SELECT {', '.join(calls)}")
        connection.autocommit = False

    return engine


def _create_sqlite(url: sa.URL) -> sa.Engine:
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise config_error(
            f"SQLite {sqlite3.sqlite_version} is too old, {'.'.join(map(str, _OLDEST_SQLITE))} is needed"
        )
    engine = sa.create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_S}, pool_size=_POOL_SIZE)
    path = Path(url.database or "")

    @sa.event.listens_for(engine, "do_connect")
    def _make_private(*_: Any) -> None:
        make_private_folder(path.parent)
        if not path.exists():
            os.close(open_private(path, os.O_WRONLY | os.O_CREAT))  # SQLite gives the files beside it the same mode

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None  # transactions begin below, not where the driver guesses
        _write_ahead(connection)
        connection.execute("PRAGMA synchronous = FULL")  # what was accepted survives a power cut
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_WAL_PAGES}")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        if not connection.get_execution_options().get("reading"):
            _begin_writing(cast(sqlite3.Connection, connection.connection.driver_connection))

    return engine


def _begin_writing(connection: sqlite3.Connection) -> None:
    """Wait for other writers at a steady pace: SQLite's own sleeps get longer, and others overtake."""
    connection.execute("PRAGMA busy_timeout = 0")
    try:
        _insist(connection, "BEGIN IMMEDIATE")
    finally:
        connection.execute(f"PRAGMA busy_timeout = {round(_BUSY_TIMEOUT_S * 1000)}")


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Keep a write-ahead log. The first connection ever needs the whole file for that, and its wait is not SQLite's."""
    _insist(connection, "PRAGMA journal_mode = WAL")


def _insist(connection: sqlite3.Connection, statement: str) -> None:
    """Execute it once the database is free. Raises sqlite3.OperationalError."""
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
