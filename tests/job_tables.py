"""Create the job tables of SQLite databases without Alembic, which needs 30 ms of CPU time for each database."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from stable_audio_serve.jobs.store import database
from stable_audio_serve.jobs.store.migrations import upgrade as migrations

__all__ = ["copied_tables", "made_by_alembic"]

_MADE = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%' ORDER BY rowid"


@pytest.fixture(scope="session", autouse=True)
def copied_tables() -> Iterator[None]:
    """Give each empty SQLite database the tables that Alembic has made in the first one of this test process.

    SQLite keeps the SQL statements with which its tables and indexes were made, so the databases do not differ.
    """
    made: list[str] = []

    def upgrade(connection: sa.Connection) -> None:
        is_empty = connection.dialect.name == "sqlite" and not connection.exec_driver_sql(_MADE).first()
        if is_empty and made:
            for statement in made:
                connection.exec_driver_sql(statement)
            return
        migrations.upgrade(connection)
        if is_empty:
            revision = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one()
            statements = connection.exec_driver_sql(_MADE).scalars().all()
            made[:] = [*statements, f"INSERT INTO alembic_version VALUES ('{revision}')"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "upgrade", upgrade)
        yield


@pytest.fixture
def made_by_alembic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Alembic make all tables, for tests of upgrades."""
    monkeypatch.setattr(database, "upgrade", migrations.upgrade)
