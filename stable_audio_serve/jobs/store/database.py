"""Transactions on the job tables in SQLite or PostgreSQL. Blocking: call from worker threads."""

from __future__ import annotations

import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects import sqlite as sqlite_dialect

from stable_audio_serve.core.clock import SystemClock
from stable_audio_serve.core.errors import ConfigError, StorageError, StorageFullError, StoreMovedError
from stable_audio_serve.jobs.store import sqlite
from stable_audio_serve.jobs.store.errors import at_start, at_work, config_error
from stable_audio_serve.jobs.store.migrations.upgrade import require_known, upgrade
from stable_audio_serve.jobs.store.tables import IDENTITY, JOBS

_POOL_SIZE = 8
_POOL_OVERFLOW = 8
_POOL_TIMEOUT_S = 10.0
_RETRY_S = 5.0
_LEAST_ROOM_BYTES = 1_048_576
_CHECK_FILE_EVERY_S = 1.0
# The longest checkpoint on a busy machine, and the pause between two attempts to read during one, in seconds.
_CHECKPOINT_S, _CHECKPOINT_PAUSE_S = 3.0, 0.02

# Options of psycopg for which the URL has no value. They detect a server that vanishes without closing the connection.
# In seconds, except for the last, which is in milliseconds.
_CONNECT = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
_SESSION = {
    # In milliseconds. The third timeout releases the locks of a process that froze within a transaction.
    "statement_timeout": 30_000,
    "lock_timeout": 15_000,
    "idle_in_transaction_session_timeout": 10_000,
    # A queue can grow faster than the query planner's statistics, so plans are never reused. Every query has an index
    # in the order of its result, so sorting is never needed.
    "plan_cache_mode": "force_custom_plan",
    "enable_sort": "off",
    "jit": "off",
}
_NO_WAIT_FOR_DISK = sa.select(sa.func.set_config("synchronous_commit", "off", True))


def database_url(url: str | None, folder: Path) -> sa.URL:
    """Return the URL of the configured database; without `url`, a SQLite file in `folder`.

    Raises ConfigError if the database is not supported.
    """
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
    """Opens transactions on the tables. The first transaction creates or upgrades the tables.

    `now` is an SQL expression for the time in Unix seconds. PostgreSQL uses the server's clock, because the machines'
    clocks differ.
    """

    def __init__(self, url: sa.URL, *, identity: str | None = None, now: Callable[[], float] | None = None) -> None:
        """Does not connect yet.

        `now` returns Unix seconds; the default is the server's clock, or this machine's for SQLite. With an `identity`
        (from `JobStore.identity`), a database with another identity is refused, and none is created or upgraded. Raises
        ConfigError if a required package is not installed.
        """
        self.url = url
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self._identity = identity
        self._adopt: Callable[[], None] = lambda: None
        self._require_in_place: Callable[[], None] = lambda: None
        if self.is_sqlite:
            self.engine, file = sqlite.create_engine(url, may_create=identity is None)
            self._adopt, self._require_in_place = file.adopt, file.require
            without_log: sa.Engine | None = sqlite.create_engine_without_log(file)
        else:
            self.engine, without_log = _create_postgresql(url), None
        self._not_durable = self.engine.execution_options(is_durable=False)
        self._reader = self.engine.execution_options(reading=True)
        if not self.is_sqlite:  # a single statement needs no BEGIN and ROLLBACK
            self._reader = self._reader.execution_options(isolation_level="AUTOCOMMIT")
        self._identity_reader = without_log or self._reader
        self._has_identity = False
        self.now = _server_time() if now is None and not self.is_sqlite else _time_of(now or SystemClock().time)
        self._lock = threading.Lock()
        self._is_ready = False
        self._file_checked_at = float("-inf")
        self._is_faulty = False

    def __str__(self) -> str:
        if self.is_sqlite:
            return f"SQLite {self.url.database}"
        return f"PostgreSQL {self.url.host or ''}{f':{self.url.port}' if self.url.port else ''}/{self.url.database}"

    def insert(self, table: sa.Table) -> sqlite_dialect.Insert | postgresql.Insert:
        """Return an INSERT that supports ON CONFLICT."""
        return sqlite_dialect.insert(table) if self.is_sqlite else postgresql.insert(table)

    @contextmanager
    def writing(self, *, is_durable: bool = True) -> Iterator[sa.Connection]:
        """Open a transaction. On SQLite it excludes all other writers. Raises StorageError.

        Without `is_durable` the commit does not wait for the disk, so a power failure may undo it. It never undoes a
        durable commit.
        """
        with at_work():
            self._make_ready()
            self._check_file()
            with (self.engine if is_durable else self._not_durable).begin() as connection:
                if not (is_durable or self.is_sqlite):
                    connection.execute(_NO_WAIT_FOR_DISK)
                yield connection
            self._require_in_place()  # a change to a moved file would be lost

    @contextmanager
    def writing_alone(self, lock: int, *, is_durable: bool = True) -> Iterator[sa.Connection]:
        """Open a `writing` transaction that excludes others with the same lock number. Raises StorageError."""
        with self.writing(is_durable=is_durable) as connection:
            if not self.is_sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(lock)))
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """Open a connection that never waits for writers. Each statement sees all earlier commits. Raises
        StorageError.
        """
        with at_work():
            self._make_ready()
            with self._reader.connect() as connection:
                yield connection

    def require_same(self) -> None:
        """Raise StoreMovedError if the database was replaced since the start.

        For SQLite, only the database file is read, because the write-ahead log still holds the former identity. Raises
        StorageError if the tables were upgraded to a revision that this version must not use.
        """
        with at_work():
            self._make_ready()
            self._require_known_revision()
            self._require_same_file()

    def require_room(self) -> None:
        """Raise StorageFullError if SQLite's disk is nearly full, even if small changes still fit into the log.

        Does nothing for PostgreSQL, which reports a full disk at the next write.
        """
        if not self.is_sqlite:
            return
        with at_work():
            space = shutil.disk_usage(Path(self.url.database or "").absolute().parent)
        if space.free < _LEAST_ROOM_BYTES:
            raise StorageFullError("the disk of the job database is full")

    def prepare(self) -> None:
        """Create or upgrade the tables.

        Raises ConfigError with the reason if the server is unreachable, denies access, or has tables of a newer
        version.
        """
        with at_start(self):
            self._make_ready()

    def check_writable(self) -> None:
        """Raise ConfigError with the reason if the database is read-only, or if this user may not write."""
        with at_start(self), self.engine.begin() as connection:
            connection.execute(sa.delete(JOBS).where(sa.false()))

    def rehearse(self) -> None:
        """Do as `prepare` and `check_writable`, then undo all changes. A missing SQLite file would be created."""
        with at_start(self), self.engine.connect() as connection, connection.begin() as transaction:
            self._prepare(connection)
            connection.execute(sa.delete(JOBS).where(sa.false()))
            transaction.rollback()

    def close(self) -> None:
        self.engine.dispose()

    def _check_file(self) -> None:
        """Check the identity in SQLite's file once a second.

        A change to an overwritten file would be lost, although the log would still accept it.
        """
        if self.is_sqlite and time.monotonic() - self._file_checked_at > _CHECK_FILE_EVERY_S:
            self._require_same_file()
            self._file_checked_at = time.monotonic()

    def _require_same_file(self) -> None:
        """Read and check the identity.

        SQLite's file is read without locks, perhaps in the middle of a checkpoint, so errors are retried for up to
        `_CHECKPOINT_S`. If an error lasted that long, later calls raise at once.
        """
        give_up_at = time.monotonic() + (_CHECKPOINT_S if self.is_sqlite and not self._is_faulty else 0.0)
        while True:
            try:
                self._read_identity()
            except (sa.exc.DBAPIError, sqlite3.Error):
                self._is_faulty = self._is_faulty or time.monotonic() >= give_up_at
                if self._is_faulty:
                    raise
                time.sleep(_CHECKPOINT_PAUSE_S)
            else:
                self._is_faulty = False
                return

    def _read_identity(self) -> None:
        with self._identity_reader.connect() as connection:
            found = find_identity(connection)
        if found is None and not self._has_identity:  # before the first checkpoint
            return
        self._has_identity = True
        self._identity = self._identity or found
        self._require_identity(found)

    def _make_ready(self) -> None:
        if self._is_ready:
            return
        with self._lock:
            if not self._is_ready:
                try:
                    with self.engine.begin() as connection:  # other processes may start at the same time
                        self._prepare(connection)
                except BaseException:
                    self.engine.dispose()  # closes connections to what may be the wrong database
                    raise
                self._adopt()
                if self.is_sqlite:  # move the identity from the log into the file
                    with self._reader.connect() as connection:
                        connection.execute(sa.text("PRAGMA wal_checkpoint(PASSIVE)"))
                self._is_ready = True

    def _prepare(self, connection: sa.Connection) -> None:
        if self._identity is None:
            upgrade(connection)
            new = {"seq": 1, "id": secrets.token_hex(16), "secret": secrets.token_hex(32)}
            connection.execute(self.insert(IDENTITY).values(new).on_conflict_do_nothing())
        else:
            self._require_identity(find_identity(connection))
            require_known(connection)

    def _require_known_revision(self) -> None:
        with self._reader.connect() as connection:
            try:
                require_known(connection)
            except ConfigError as error:
                raise StorageError(error.message, retry_after_s=_RETRY_S) from error

    def _require_identity(self, found: str | None) -> None:
        if found != self._identity:
            problem = "the job database is another one than at the start"
            raise StoreMovedError(problem, retry_after_s=_RETRY_S)


def find_identity(connection: sa.Connection) -> str | None:
    """Return the random identity of this database, None before its tables or identity exist."""
    if not sa.inspect(connection).has_table(IDENTITY.name):
        return None
    found: str | None = connection.execute(sa.select(IDENTITY.c.id)).scalar()
    return found


def _server_time() -> sa.ColumnElement[float]:
    return sa.cast(sa.extract("epoch", sa.func.statement_timestamp()), sa.Double)


def _time_of(clock: Callable[[], float]) -> sa.ColumnElement[float]:
    """Return SQL for the time of `clock`, read each time a statement runs."""
    return sa.bindparam("now", callable_=clock, type_=sa.Double)


def _create_postgresql(url: sa.URL) -> sa.Engine:
    try:
        engine = sa.create_engine(
            url,
            isolation_level="READ COMMITTED",  # `transitions` relies on this level for compare-and-set
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
