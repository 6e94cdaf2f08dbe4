"""Create and upgrade the job tables with Alembic revisions. Several processes may do this at once.

Servers of two successive revisions can share a database while one replaces the other. For this, a revision may add
tables, columns with defaults, and indexes that are not unique, and may remove only what older servers can do without.
Therefore this version of the package also accepts tables of the next revision after its own. It refuses later
revisions, which may need columns that this version does not fill.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from stable_audio_serve.jobs.store.errors import config_error
from stable_audio_serve.jobs.store.tables import JOBS

_LOCK = 0x53415501  # number of a PostgreSQL advisory lock, which no other lock in the database has
_FOLDER = Path(__file__).parent


def upgrade(connection: sa.Connection, *, folder: Path = _FOLDER) -> None:
    """Upgrade the tables to the newest revision in `folder`, unless they have that revision or the next one.

    Runs in the transaction of `connection`. Raises ConfigError if the tables are of a later version or of another
    program, or if the database cannot store every text.
    """
    if connection.dialect.name == "postgresql":  # SQLite needs no lock, because it has a single writer
        no_limit = (sa.func.set_config(name, "0", True) for name in ("statement_timeout", "lock_timeout"))
        connection.execute(sa.select(*no_limit))
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        encoding = connection.execute(sa.text("SHOW server_encoding")).scalar()
        if encoding not in ("UTF8", "SQL_ASCII"):
            raise config_error(f"its encoding {encoding} lacks characters; create a database with the encoding UTF8")
    found = require_known(connection, folder=folder)
    if found is not None and int(found) >= int(newest_revision(folder)):
        return
    if found is None and sa.inspect(connection).has_table(JOBS.name):
        raise config_error(f"there is a table {JOBS.name} that is not ours; use another database")

    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    command.upgrade(config, "head")


def newest_revision(folder: Path = _FOLDER) -> str:
    """Return the newest revision in `folder`. Revisions are numbered 0001, 0002, ..."""
    return max(path.name[:4] for path in (folder / "versions").glob("[0-9]*_*.py"))


def require_known(connection: sa.Connection, *, folder: Path = _FOLDER) -> str | None:
    """Return the revision of the tables, or None if there are no tables.

    Raises ConfigError unless the revision is in `folder`, or is the one after the newest in `folder`.
    """
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
    if found is None:
        return None
    if not found.isdecimal():
        raise config_error(f"its tables are of revision {found}, which is none of ours; use another database")
    ours = int(newest_revision(folder))
    if int(found) > ours + 1:
        raise config_error(
            f"the tables were made by a newer version of stable-audio-serve (revision {found}); this one knows "
            f"{ours:04d} and works with {ours + 1:04d} at most: start that newer version, or use the database as it "
            "was before that upgrade"
        )
    return found
