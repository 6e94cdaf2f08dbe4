"""Converts database errors: at startup to a ConfigError of one sentence, later to a StorageError, which clients may
retry.
"""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from stable_audio_serve.core.errors import ConfigError, StorageError, StorageFullError

log = structlog.get_logger("stable_audio_serve.jobs")

_RETRY_S = 2.0
# SQLite raises its own errors for statements outside SQLAlchemy, such as waiting for a lock.
_ERRORS = (SQLAlchemyError, sqlite3.Error, OSError)
_FULL = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE", "53100")  # SQLite error names and the PostgreSQL SQLSTATE


def config_error(message: str) -> ConfigError:
    """Return the error for a configured database that cannot be used."""
    return ConfigError(f"jobs.database_url (STABLE_AUDIO_DATABASE_URL): {message}", field="jobs.database_url")


@contextmanager
def at_start(database: object) -> Iterator[None]:
    """Convert any database error to ConfigError with the reason. `str(database)` names the database."""
    try:
        yield
    except _ERRORS as error:
        raise config_error(f"{database} cannot be used: {_reason(error)}") from error


@contextmanager
def at_work() -> Iterator[None]:
    """Convert any database error to StorageError. The reason goes only to the log."""
    try:
        yield
    except (*_ERRORS, ConfigError) as error:
        log.error("the job database failed", error=_reason(error))
        if _is_full(error):
            raise StorageFullError("the disk of the job database is full") from error
        raise StorageError("the job database cannot be used now", retry_after_s=_RETRY_S) from error


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    cause = error.orig if isinstance(error, DBAPIError) else error
    return getattr(cause, "sqlite_errorname", None) in _FULL or getattr(cause, "sqlstate", None) in _FULL


def _reason(error: Exception) -> str:
    """Return the reason in one line, without the SQL statement, which may contain clients' data."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    lines = str(cause).strip().splitlines()
    return lines[0] if lines else type(cause).__name__
