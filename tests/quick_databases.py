"""Let the hundreds of job databases of the tests share tables and SQL, to save 50 ms of CPU time for each database.

Otherwise Alembic creates the tables of each database, and SQLAlchemy compiles each statement again for each engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from stable_audio_serve.jobs.store import database
from stable_audio_serve.jobs.store.migrations import upgrade as migrations

__all__ = ["made_by_alembic", "quick_databases"]

_MADE = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%' ORDER BY rowid"


class _CompiledStatements(dict[Any, Any]):
    """A `compiled_cache` of SQLAlchemy that all engines of a dialect share. A key begins with the engine's dialect."""

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get((key[0].name, *key[1:]), default)

    def __setitem__(self, key: Any, compiled: Any) -> None:
        super().__setitem__((key[0].name, *key[1:]), compiled)


@pytest.fixture(scope="session", autouse=True)
def quick_databases() -> Iterator[None]:
    """Give each empty SQLite database the tables that Alembic has made in the first one of this test process.

    SQLite keeps the SQL statements with which its tables and indexes were made, so the databases do not differ.
    """
    made: list[str] = []
    compiled = _CompiledStatements()
    create_engine = sa.create_engine

    def create_sharing_engine(*args: Any, **options: Any) -> sa.Engine:
        engine = create_engine(*args, **options)
        engine.update_execution_options(compiled_cache=compiled)
        return engine

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
        patch.setattr(sa, "create_engine", create_sharing_engine)
        yield


@pytest.fixture
def made_by_alembic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Alembic make all tables, for tests of upgrades."""
    monkeypatch.setattr(database, "upgrade", migrations.upgrade)
