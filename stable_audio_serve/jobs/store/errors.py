"""Convert errors of the job database to errors of `core.errors`.

At the start of the server, the result is a ConfigError with the reason. Later it is a StorageError, after which clients
may retry.
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
# `sqlite3.Error` is raised by statements that do not go through SQLAlchemy, for example BEGIN.
_ERRORS = (SQLAlchemyError, sqlite3.Error, OSError)
_FULL = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE", "53100")  # SQLite's error names, and PostgreSQL's SQLSTATE


def config_error(message: str) -> ConfigError:
    """Return the error for a configured job database that cannot be used. `message` is the reason."""
    return ConfigError(f"jobs.database_url (STABLE_AUDIO_DATABASE_URL): {message}", field="jobs.database_url")


@contextmanager
def at_start(database: object) -> Iterator[None]:
    """Raise ConfigError in place of a database error. The message names `database` and the reason."""
    try:
        yield
    except _ERRORS as error:
        raise config_error(f"{database} cannot be used: {_reason(error)}") from error


@contextmanager
def at_work() -> Iterator[None]:
    """Raise StorageError in place of a database error.

    Clients see the message of the StorageError, so it does not contain the reason. The reason is logged.
    """
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
    """Return the reason of an error in one line, without the SQL statement, which may contain clients' data."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    lines = str(cause).strip().splitlines()
    return lines[0] if lines else type(cause).__name__
