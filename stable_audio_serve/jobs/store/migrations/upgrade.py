"""Creates and upgrades the tables of jobs by Alembic's revisions. Several processes may do so at once."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from stable_audio_serve.jobs.store.errors import config_error
from stable_audio_serve.jobs.store.tables import JOBS

REVISION = "0001"  # the newest one, which this version reads and writes

_LOCK = 0x53415501  # the number of a lock; any that nobody else uses
_FOLDER = Path(__file__).parent


def upgrade(connection: sa.Connection) -> None:
    """Upgrade in this transaction. Raises ConfigError for tables of a newer version, or of another program."""
    if connection.dialect.name == "postgresql":  # SQLite has one writer anyway
        no_limit = (sa.func.set_config(name, "0", True) for name in ("statement_timeout", "lock_timeout"))
        connection.execute(sa.select(*no_limit))
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
    found = _found_revision(connection)
    if found == REVISION:
        return
    if found is not None and not any((_FOLDER / "versions").glob(f"{found}_*.py")):
        raise config_error(
            f"the tables were made by a newer version of stable-audio-serve (revision {found}, ours is {REVISION})"
        )
    if found is None and sa.inspect(connection).has_table(JOBS.name):
        raise config_error(f"there is a table {JOBS.name} that is not ours; use another database")

    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    command.upgrade(config, "head")


def _found_revision(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
    return found
