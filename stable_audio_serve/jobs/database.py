"""The tables jobs are kept in, and transactions on them, on SQLite or PostgreSQL. Blocking: for worker threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from stable_audio_serve.core.errors import ConfigError, StorageError

log = structlog.get_logger("stable_audio_serve.jobs")

METADATA = sa.MetaData()
REVISION = "0001"  # of Alembic's history: what this version reads and writes

_Number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # the only type SQLite counts up by itself

JOBS = sa.Table(
    "jobs",
    METADATA,
    sa.Column("seq", _Number, primary_key=True),  # order of arrival
    sa.Column("contract", sa.Text, nullable=False),
    sa.Column("id", sa.Text, nullable=False),
    sa.Column("client", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("turn", sa.Double, nullable=False),  # when it would have had to come, to be served in order of arrival
    sa.Column("spec", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),  # this and all times: Unix seconds
    sa.Column("started_at", sa.Double),
    sa.Column("completed_at", sa.Double),
    sa.Column("not_before", sa.Double, nullable=False),
    sa.Column("start_before", sa.Double),
    sa.Column("owner", sa.Text),
    sa.Column("fence", sa.Integer, nullable=False, server_default="0"),
    sa.Column("lease_until", sa.Double),
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("cancel_requested", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("is_dead_letter", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("stage", sa.Text, nullable=False, server_default="queued"),
    sa.Column("fraction", sa.Double, nullable=False, server_default="0"),
    sa.Column("eta_s", sa.Double),
    sa.Column("result", sa.Text),
    sa.Column("error", sa.Text),
    sa.Column("idempotency_key", sa.Text),
    sa.Column("fingerprint", sa.Text, nullable=False),
    sa.Column("upload_key", sa.Text),
    sa.Column("result_key", sa.Text),
    sa.Column("webhook_url", sa.Text),
    sa.Column("webhook_at", sa.Double),  # when to try next; none = nothing to deliver
    sa.Column("webhook_attempts", sa.Integer, nullable=False, server_default="0"),
    sa.UniqueConstraint("contract", "id"),
    sa.UniqueConstraint("contract", "client", "idempotency_key"),
    sa.Index("jobs_by_turn", "state", "model", "turn", "seq"),
    sa.Index("jobs_by_retry", "state", "not_before"),
    sa.Index("jobs_by_lateness", "state", "start_before"),
    sa.Index("jobs_by_lease", "state", "lease_until"),
    sa.Index("jobs_by_owner", "owner"),
    sa.Index("jobs_by_client", "client", "contract", "seq"),
    sa.Index("jobs_by_end", "completed_at"),
    sa.Index("jobs_by_webhook", "webhook_at"),
    sa.Index("jobs_by_upload", "upload_key"),
    sa.Index("jobs_by_result", "result_key"),
    sqlite_autoincrement=True,
)

EVENTS = sa.Table(
    "events",
    METADATA,
    sa.Column("id", _Number, primary_key=True),
    sa.Column("job", _Number, sa.ForeignKey("jobs.seq", ondelete="CASCADE"), nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("stage", sa.Text, nullable=False),
    sa.Column("fraction", sa.Double, nullable=False),
    sa.Column("eta_s", sa.Double),
    sa.Column("message", sa.Text),
    sa.Index("events_of_job", "job", "id"),
    sqlite_autoincrement=True,
)

# Files that links without a key lead to: finished audio, and whatever a dialect lets its clients store.
FILES = sa.Table(
    "files",
    METADATA,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("file", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Index("files_by_key", "key"),
    sa.Index("files_by_age", "created_at"),
)

_BUSY_TIMEOUT_S = 15.0
_RETRY_S = 2.0
_MIGRATION_LOCK = 0x53415544  # any number of our own


def database_url(url: str | None, folder: Path) -> sa.URL:
    """The configured database, or SQLite in `folder`. Raises ConfigError for what cannot be used."""
    if url is None:
        return sa.URL.create("sqlite", database=str(folder / "jobs.db"))
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise _config_error("not a database URL") from error
    kind = parsed.drivername.partition("+")[0]
    if kind == "sqlite" and parsed.database and parsed.database != ":memory:":
        return parsed.set(drivername="sqlite")
    if kind in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    raise _config_error("only SQLite files (sqlite:////path/to/jobs.db) and PostgreSQL (postgresql://...) can be used")


class Database:
    """Transactions on the tables, which are brought up to date before the first one."""

    def __init__(self, url: sa.URL, *, now: Callable[[], float] | None = None) -> None:
        """Touches nothing yet. `now` gives Unix time in seconds; unset = the clock that all who share the tables do."""
        self.url = url
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self.engine = _create_sqlite(url) if self.is_sqlite else _create_postgresql(url)
        self._now = now
        self._lock = threading.Lock()
        self._is_ready = False

    def __str__(self) -> str:
        if self.is_sqlite:
            return f"SQLite {self.url.database}"
        return f"PostgreSQL {self.url.host or ''}{f':{self.url.port}' if self.url.port else ''}/{self.url.database}"

    @property
    def now(self) -> sa.ColumnElement[float]:
        """The time, Unix seconds, as SQL: the server's where there is one, because machines' clocks differ."""
        if self._now is None and not self.is_sqlite:
            return sa.cast(sa.extract("epoch", sa.func.statement_timestamp()), sa.Double)
        return sa.literal((self._now or time.time)(), sa.Double)

    def insert(self, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
        """An INSERT that can say ON CONFLICT."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction; on SQLite no other writer overlaps it. Raises StorageError."""
        with _our_errors(), self._ready().begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that waits for no writer. Raises StorageError."""
        with _our_errors(), self._ready().connect().execution_options(reading=True) as connection:
            yield connection

    def prepare(self) -> None:
        """Make or upgrade the tables. Raises StorageError, and ConfigError when a newer version of this made them."""
        with _our_errors():
            self._ready()

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    def _ready(self) -> sa.Engine:
        with self._lock:
            if not self._is_ready:
                with self.engine.begin() as connection:
                    _migrate(connection, is_sqlite=self.is_sqlite)
                self._is_ready = True
        return self.engine


def _migrate(connection: sa.Connection, *, is_sqlite: bool) -> None:
    """Upgrade to `REVISION`; looking and changing in one transaction, because others start too."""
    if not is_sqlite:
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
    if sa.inspect(connection).has_table("alembic_version"):
        found = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
        if found == REVISION:
            return
        if found is not None and found > REVISION:
            raise _config_error(f"made by a newer version of stable-audio-serve (schema {found}, ours is {REVISION})")
    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    command.upgrade(config, "head")


@contextmanager
def _our_errors() -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        log.error("the job database failed", error=str(error.__cause__ or error))
        raise StorageError("the job database cannot be used now", retry_after_s=_RETRY_S) from error


def _config_error(message: str) -> ConfigError:
    return ConfigError(f"jobs.database_url (STABLE_AUDIO_DATABASE_URL): {message}", field="jobs.database_url")


def _create_postgresql(url: sa.URL) -> sa.Engine:
    try:
        return sa.create_engine(url, pool_pre_ping=True, pool_size=8, max_overflow=8)
    except ImportError as error:
        raise _config_error("PostgreSQL needs psycopg: pip install 'stable-audio-serve[postgres]'") from error


def _create_sqlite(url: sa.URL) -> sa.Engine:
    engine = sa.create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_S})
    path = Path(url.database or "")

    @sa.event.listens_for(engine, "do_connect")
    def _make_folder(*_: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin below, not where the driver guesses
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # what was accepted survives a power cut
        connection.execute("PRAGMA foreign_keys = ON")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        reading = connection.get_execution_options().get("reading")
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    return engine
