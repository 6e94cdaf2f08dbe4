"""The tables jobs are kept in, and transactions on them. Blocking: for worker threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import SQLAlchemyError

from stable_audio_serve.core.errors import ConfigError, StorageError

log = structlog.get_logger("stable_audio_serve.jobs")

METADATA = sa.MetaData()

JOBS = sa.Table(
    "jobs",
    METADATA,
    sa.Column("seq", sa.Integer, primary_key=True),  # order of arrival
    sa.Column("contract", sa.String, nullable=False),
    sa.Column("id", sa.String, nullable=False),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),  # lower first
    sa.Column("spec", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),  # this and all times: Unix seconds
    sa.Column("started_at", sa.Double),
    sa.Column("completed_at", sa.Double),
    sa.Column("not_before", sa.Double, nullable=False),
    sa.Column("start_before", sa.Double),
    sa.Column("owner", sa.String),
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    sa.Column("cancel_requested", sa.Boolean, nullable=False, default=False),
    sa.Column("stage", sa.String, nullable=False, default="queued"),
    sa.Column("fraction", sa.Double, nullable=False, default=0.0),
    sa.Column("logs", sa.Text, nullable=False),
    sa.Column("result", sa.Text),
    sa.Column("error", sa.Text),
    sa.Column("webhook_url", sa.Text),
    sa.Column("webhook_at", sa.Double),  # when to try next; none = nothing to deliver
    sa.Column("webhook_attempts", sa.Integer, nullable=False, default=0),
    sa.UniqueConstraint("contract", "id"),
    sa.Index("jobs_by_turn", "state", "priority", "seq"),
    sa.Index("jobs_by_retry", "state", "not_before"),
    sa.Index("jobs_by_lateness", "state", "start_before"),
    sa.Index("jobs_by_webhook", "webhook_at"),
    sqlite_autoincrement=True,
)

# Files that links without a key lead to: finished audio, and whatever a dialect lets its clients store.
FILES = sa.Table(
    "files",
    METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("file", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)

_BUSY_TIMEOUT_S = 15.0


def database_url(url: str | None, folder: Path) -> str:
    """The configured database, or SQLite in `folder`. Raises ConfigError for what cannot be used."""
    if url is None:
        return f"sqlite:///{folder / 'jobs.db'}"
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise ConfigError("jobs.database_url: not a database URL", field="jobs.database_url") from error
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        raise ConfigError(
            "jobs.database_url: only SQLite files (sqlite:////path/to/jobs.db) can be used yet",
            field="jobs.database_url",
        )
    return url


class Database:
    """Transactions on the tables, which are made, with the folder of a SQLite file, before the first one."""

    def __init__(self, url: str) -> None:
        """Touches nothing yet."""
        self.engine = _create_engine(url)
        self._lock = threading.Lock()
        self._is_ready = False

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that no other writer overlaps. Raises StorageError."""
        with _our_errors(), self._ready().begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that sees one state of the tables and waits for no writer. Raises StorageError."""
        with _our_errors(), self._ready().connect().execution_options(reading=True) as connection:
            yield connection

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    def _ready(self) -> sa.Engine:
        with self._lock:
            if not self._is_ready:
                with self.engine.begin() as connection:  # looking and making in one transaction: others start too
                    METADATA.create_all(connection)
                self._is_ready = True
        return self.engine


@contextmanager
def _our_errors() -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        log.error("the job database failed", error=str(error.__cause__ or error))
        raise StorageError("the job database cannot be used now") from error


def _create_engine(url: str) -> sa.Engine:
    engine = sa.create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_S})
    path = Path(engine.url.database or "")

    @sa.event.listens_for(engine, "do_connect")
    def _make_folder(*_: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin below, not where the driver guesses
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # what was accepted survives a power cut

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        reading = connection.get_execution_options().get("reading")
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    return engine
