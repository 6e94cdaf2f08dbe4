"""Transactions on the job tables in SQLite or PostgreSQL. Blocking: call from worker threads."""

from __future__ import annotations

import secrets
import shutil
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
from stable_audio_serve.jobs.store.tables import IDENTITY

_POOL_SIZE = 8
_POOL_OVERFLOW = 8
_POOL_TIMEOUT_S = 10.0
_RETRY_S = 5.0
_LEAST_ROOM_BYTES = 1_048_576
_READ_ONLY = "25006"  # SQLSTATE
_FULL_FOR_S = 15.0  # PostgreSQL counts as full for this time after it had no room for a write of this process
_CHECK_FILE_EVERY_S = 1.0

# Defaults of psycopg's connection options. The last five detect a database server that vanishes without closing the
# connection. Their times are in seconds, except `tcp_user_timeout`, which is in milliseconds.
_CONNECT = {
    "client_encoding": "utf8",  # also for a database of the encoding SQL_ASCII, which stores texts as they are
    "prepare_threshold": None,  # prepare no statements: PgBouncer may run them in a session that has others
    "target_session_attrs": "primary",  # a connection to a standby would outlast the failover, and refuse every write
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
_SESSION = {
    # The timeouts are in milliseconds. The third one ends a transaction whose process has frozen, to release its locks.
    "statement_timeout": 30_000,
    "lock_timeout": 15_000,
    "idle_in_transaction_session_timeout": 10_000,
    # The queue can grow so fast that the query planner's statistics are old, so each query is planned again. Plans that
    # sort are discouraged, because for every query there is an index with the order of the result.
    "plan_cache_mode": "force_custom_plan",
    "enable_sort": "off",
    "jit": "off",
}
_NO_WAIT_FOR_DISK = sa.select(sa.func.set_config("synchronous_commit", "off", True))


def database_url(url: str | None, folder: Path) -> sa.URL:
    """Return SQLAlchemy's URL of the job database: `url`, or if that is None, the SQLite file jobs.db in `folder`.

    Raises ConfigError if `url` is malformed, or if the database is not supported.
    """
    if url is None:
        return sa.URL.create("sqlite", database=str(folder / "jobs.db"))
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError) as error:
        raise config_error("not a database URL") from error
    if "@" in (parsed.host or ""):  # its beginning is the end of the password, and would be part of error messages
        raise config_error("write an @ in the user name or password as %40")
    kind = parsed.drivername.partition("+")[0]
    if kind == "sqlite" and parsed.database and parsed.database != ":memory:" and not parsed.query:
        return parsed.set(drivername="sqlite")
    if kind in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    raise config_error("only SQLite files (sqlite:////path/to/jobs.db) and PostgreSQL (postgresql://...) can be used")


class Database:
    """Opens transactions on the job tables. The first transaction creates or upgrades the tables.

    `now` is an SQL expression for the current time in Unix seconds. With PostgreSQL it is the time of the database
    server, because the clocks of the machines that use the database differ.
    """

    def __init__(self, url: sa.URL, *, identity: str | None = None, now: Callable[[], float] | None = None) -> None:
        """The constructor does not connect. It raises ConfigError if a required package is not installed.

        `now` returns Unix seconds and replaces the clock. If `identity` (from `JobStore.identity`) is given, a database
        with another identity is refused, and no database is created or upgraded.
        """
        self.url = url
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self._identity = identity
        self._file: sqlite.DatabaseFile | None = None
        if self.is_sqlite:
            self.engine, self._file = sqlite.create_engine(url, may_create=identity is None)
            self._reader = self.engine.execution_options(reading=True)
            self._identity_reader = sqlite.create_engine_without_log(self._file)
        else:
            self.engine = _create_postgresql(url)
            sa.event.listen(self.engine, "connect", self._require_same_server)
            # Readers run single statements, which need no BEGIN and ROLLBACK.
            self._reader = self._identity_reader = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        self._not_durable = self.engine.execution_options(is_durable=False)
        self._has_identity = False
        self.now = _server_time() if now is None and not self.is_sqlite else _time_of(now or SystemClock().time)
        self._lock = threading.Lock()
        self._is_ready = False
        self._file_checked_at = self._full_at = float("-inf")

    def __str__(self) -> str:
        if self.is_sqlite:
            return f"SQLite {self.url.database}"
        return f"PostgreSQL {self.url.host or ''}{f':{self.url.port}' if self.url.port else ''}/{self.url.database}"

    def insert(self, table: sa.Table) -> sqlite_dialect.Insert | postgresql.Insert:
        """Return an INSERT statement for `table`. The statement supports ON CONFLICT."""
        return sqlite_dialect.insert(table) if self.is_sqlite else postgresql.insert(table)

    @contextmanager
    def writing(self, *, is_durable: bool = True) -> Iterator[sa.Connection]:
        """Open a transaction for writing. On SQLite, it excludes all other writers. Raises StorageError.

        If `is_durable` is false, the commit does not wait for the disk, so a power failure may undo this transaction.
        Durable transactions are never undone.
        """
        with self._noting_full(), at_work():
            self._make_ready()
            self._check_file()
            with (self.engine if is_durable else self._not_durable).begin() as connection:
                if not (is_durable or self.is_sqlite):
                    connection.execute(_NO_WAIT_FOR_DISK)
                yield connection
            if self._file is not None:  # if it was moved, the change would be lost
                self._file.require()

    @contextmanager
    def _noting_full(self) -> Iterator[None]:
        try:
            yield
        except StorageFullError:
            self._full_at = time.monotonic()
            raise

    @contextmanager
    def writing_alone(self, lock: int, *, is_durable: bool = True) -> Iterator[sa.Connection]:
        """Open a transaction for writing. It waits until no other transaction with this lock number runs.

        Raises StorageError.
        """
        with self.writing(is_durable=is_durable) as connection:
            if not self.is_sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(lock)))
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """Open a connection for reading, which never waits for writers. Raises StorageError.

        Each statement sees all transactions that were committed before it.
        """
        with at_work():
            self._make_ready()
            with self._reader.connect() as connection:
                yield connection

    def require_same(self) -> None:
        """Raise StoreMovedError if the database was replaced by another one since the start.

        Raises StorageError if the tables were upgraded to a revision that this version of the package must not use. On
        SQLite, the identity is read from the database file without the write-ahead log, because the log would still
        have the old identity.
        """
        with at_work():
            self._make_ready()
            self._require_known_revision()
            self._require_same_file()

    def require_room(self) -> None:
        """Raise StorageFullError if the disk of the SQLite file is nearly full, or if PostgreSQL just refused a write.

        Small changes could still succeed then, because they fit into the write-ahead log, or into a page with room.
        """
        if self.is_sqlite:
            with at_work():
                space = shutil.disk_usage(Path(self.url.database or "").absolute().parent)
            is_full = space.free < _LEAST_ROOM_BYTES
        else:
            is_full = time.monotonic() < self._full_at + _FULL_FOR_S
        if is_full:
            raise StorageFullError("the disk of the job database is full")

    def prepare(self) -> None:
        """Create or upgrade the tables, if that is necessary.

        Raises ConfigError with the reason if the database server is unreachable, denies access, is read-only, or has
        tables of a newer version.
        """
        with at_start(self):
            self._make_ready()

    def rehearse(self) -> None:
        """Do what `prepare` does, then undo all changes. A missing SQLite file is still created."""
        with at_start(self), self.engine.connect() as connection, connection.begin() as transaction:
            self._prepare(connection)
            transaction.rollback()

    def close(self) -> None:
        self.engine.dispose()

    def _check_file(self) -> None:
        """Raise StoreMovedError if SQLite's file has another identity. Checks at most once a second.

        If the file was overwritten, a change would be lost, although the write-ahead log would still accept it.
        """
        if self.is_sqlite and time.monotonic() - self._file_checked_at > _CHECK_FILE_EVERY_S:
            self._require_same_file()
            self._file_checked_at = time.monotonic()

    def _require_same_file(self) -> None:
        """Read the database's identity and compare it with the expected one. Raises StoreMovedError if they differ."""
        with self._identity_reader.connect() as connection:
            found = find_identity(connection)
        # Before the first checkpoint, the identity is only in SQLite's log, so the file does not have it.
        if found is None and not self._has_identity:
            return
        self._has_identity = True
        self._identity = self._identity or found
        self._require_identity(found)

    def _require_same_server(self, connection: Any, _: Any) -> None:
        """Refuse a new connection that leads to another database, for example after a failover of PostgreSQL.

        Raises StoreMovedError. Jobs that the other database accepted would be lost as soon as the first one is back.
        """
        if self._is_ready and self._identity is not None:
            try:
                found = connection.execute(f"SELECT id FROM {IDENTITY.name}").fetchone()
                connection.rollback()
                self._require_identity(found and found[0])
            except BaseException:
                connection.close()
                raise

    def _make_ready(self) -> None:
        if self._is_ready:
            return
        with self._lock:
            if not self._is_ready:
                try:
                    # In one transaction, because other processes may prepare the database at the same time.
                    with self.engine.begin() as connection:
                        self._prepare(connection)
                except BaseException:
                    self.engine.dispose()  # closes the connections, which may be connected to a wrong database
                    raise
                if self._file is not None:
                    self._file.adopt()
                    # The checkpoint moves the identity from the write-ahead log into the file.
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
    """Return the random identity of this database, or None if its tables or its identity do not exist yet."""
    if not sa.inspect(connection).has_table(IDENTITY.name):
        return None
    found: str | None = connection.execute(sa.select(IDENTITY.c.id)).scalar()
    return found


def _server_time() -> sa.ColumnElement[float]:
    return sa.cast(sa.extract("epoch", sa.func.statement_timestamp()), sa.Double)


def _time_of(clock: Callable[[], float]) -> sa.ColumnElement[float]:
    """Return an SQL expression for the time of `clock`. The clock is read each time a statement runs."""
    return sa.bindparam("now", callable_=clock, type_=sa.Double)


def _create_postgresql(url: sa.URL) -> sa.Engine:
    try:
        engine = sa.create_engine(
            url,
            isolation_level="READ COMMITTED",  # the compare-and-set statements of `transitions` rely on this level
            connect_args={name: value for name, value in _CONNECT.items() if name not in url.query},
            pool_pre_ping=True,  # if the database server was restarted, replace the connection before its next use
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

    @sa.event.listens_for(engine, "handle_error")
    def _reconnect(context: sa.ExceptionContext) -> None:
        # A session that began while the database was read-only (default_transaction_read_only) stays read-only.
        if getattr(context.original_exception, "sqlstate", None) == _READ_ONLY:
            context.is_disconnect = True

    return engine
