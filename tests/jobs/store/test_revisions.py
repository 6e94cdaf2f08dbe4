"""Schema revisions of the job database: released ones never change, and later ones only add to the tables.

While a new server replaces an old one, both use the database. The old server must work with the new tables, so no
column may be removed or changed, or need a value that the old server does not write.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations

from stable_audio_serve.jobs.store.migrations import upgrade as migrations
from stable_audio_serve.jobs.store.tables import METADATA
from tests.databases import PostgresServer
from tests.jobs.stores import CONTRACT_KINDS, open_database

VERSIONS = Path(migrations.__file__).parent / "versions"
NAMES = sorted(path.stem for path in VERSIONS.glob("[0-9]*_*.py"))

# Revision -> the SHA-256 of its SQL on SQLite and on PostgreSQL. Entries never change. If a test reports a mismatch,
# restore the revision, and write a new revision that only adds to the tables.
RELEASED = {
    "0001_initial": (
        "8e078068a8d0ac05d79f2bf18b6ca384c4fbca0d3b549f67dfb7d95d9ceb9a45",
        "9e508cfeca77ea9e217550291e0fad8ceed0f394206c9b68286779c8cbb6456c",
    ),
}

_ADDING = (
    r"CREATE TABLE (?P<made>\w+) \(.*\)",
    r"CREATE INDEX \w+ ON \w+ .*",
    r"CREATE UNIQUE INDEX \w+ ON (?P<unique_on>\w+) .*",
    r"ALTER TABLE \w+ ADD COLUMN \w+ (?P<column>.*)",
)
_NO_VALUE_NEEDED = r"(?!.*\b(UNIQUE|CHECK|REFERENCES|PRIMARY)\b)((?!.*NOT NULL)|(?=.*\bDEFAULT\b))"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, VERSIONS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def statements(name: str, dialect: str) -> list[str]:
    """Return the SQL statements of a revision in an SQL dialect, each as one line."""
    module = load(name)
    written = io.StringIO()
    context = MigrationContext.configure(
        dialect_name=dialect, opts={"as_sql": True, "output_buffer": written, "literal_binds": True}
    )
    with Operations.context(context):
        module.upgrade()
    lines = (" ".join(statement.split()) for statement in written.getvalue().split(";"))
    return [line for line in lines if line]


def breaking_statements(lines: list[str]) -> list[str]:
    """Return those statements that could break an older server which uses the same tables."""
    made: set[str] = set()
    bad = []
    for line in lines:
        found = next((match for pattern in _ADDING if (match := re.fullmatch(pattern, line))), None)
        parts: dict[str, Any] = {} if found is None else found.groupdict()
        if parts.get("made"):
            made.add(parts["made"])
        holds_rows_back = "REFERENCES" in line and "ON DELETE CASCADE" not in line
        needs_value = parts.get("column") is not None and not re.match(_NO_VALUE_NEEDED, parts["column"])
        narrows = parts.get("unique_on") is not None and parts["unique_on"] not in made
        if found is None or holds_rows_back or needs_value or narrows:
            bad.append(line)
    return bad


@pytest.mark.parametrize("name", NAMES)
def test_released_revision_never_changes(name: str) -> None:
    found = tuple(
        hashlib.sha256("\n".join(statements(name, dialect)).encode()).hexdigest()
        for dialect in ("sqlite", "postgresql")
    )
    assert name in RELEASED, f"a new revision: add {name!r}: {found} to RELEASED"
    assert found == RELEASED[name], f"{name} was changed: leave it as it was, and add what is new by another revision"


@pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])
def test_later_revisions_only_add(dialect: str) -> None:
    bad = {name: breaking_statements(statements(name, dialect)) for name in NAMES[1:]}
    assert not any(bad.values()), bad


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE turns",
        "DROP INDEX jobs_dead",
        "ALTER TABLE jobs DROP COLUMN eta_s",
        "ALTER TABLE jobs RENAME COLUMN eta_s TO eta",
        "ALTER TABLE jobs ALTER COLUMN eta_s SET NOT NULL",
        "ALTER TABLE jobs ADD COLUMN work_s FLOAT NOT NULL",
        "ALTER TABLE jobs ADD COLUMN work_s FLOAT DEFAULT 0 CHECK (work_s > 0)",
        "ALTER TABLE jobs ADD CONSTRAINT one UNIQUE (id)",
        "CREATE UNIQUE INDEX one ON jobs (id)",
        "CREATE TABLE sizes (job INTEGER, FOREIGN KEY(job) REFERENCES jobs (seq))",
        "UPDATE jobs SET eta_s = 0",
        "CREATE TRIGGER one BEFORE INSERT ON jobs EXECUTE FUNCTION f()",
    ],
)
def test_breaking_statements_are_found(statement: str) -> None:
    assert breaking_statements([statement]) == [statement]


def test_additions_are_accepted() -> None:
    lines = [
        "CREATE TABLE sizes (job INTEGER NOT NULL, FOREIGN KEY(job) REFERENCES jobs (seq) ON DELETE CASCADE)",
        "CREATE UNIQUE INDEX sizes_once ON sizes (job)",
        "CREATE INDEX jobs_by_work ON jobs (work_s) WHERE state = 'queued'",
        "ALTER TABLE jobs ADD COLUMN work_s FLOAT DEFAULT 0 NOT NULL",
        "ALTER TABLE jobs ADD COLUMN note TEXT",
    ]
    assert breaking_statements(lines) == []


def test_revisions_are_numbered_one_after_another() -> None:
    """A server does not know later revisions. It recognises the next revision only by its number."""
    assert [name[:4] for name in NAMES] == [f"{number:04d}" for number in range(1, len(NAMES) + 1)]
    assert list(RELEASED) == NAMES


def test_each_revision_follows_the_one_before_it() -> None:
    modules = [load(name) for name in NAMES]
    assert [module.down_revision for module in modules] == [None, *(module.revision for module in modules[:-1])]


@pytest.mark.usefixtures("made_by_alembic")
@pytest.mark.parametrize("kind", CONTRACT_KINDS)
def test_revisions_create_the_declared_tables(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if kind == "sqlite":
        urls = [f"sqlite:///{tmp_path}/{name}.db" for name in ("migrated", "made")]
    else:
        postgres: PostgresServer = request.getfixturevalue("postgres")
        urls = [postgres.create_database() for _ in range(2)]
    migrated, made = (open_database(url) for url in urls)
    migrated.prepare()
    METADATA.create_all(made.engine)
    tables = [tables_of(database.engine) for database in (migrated, made)]
    assert tables[0].keys() == tables[1].keys() == METADATA.tables.keys()
    for name in METADATA.tables:
        assert tables[0][name] == tables[1][name]
    for database in (migrated, made):
        database.close()


def described(index: Mapping[str, Any]) -> str:
    options = {name: str(option) for name, option in index.get("dialect_options", {}).items()}
    return repr({**index, "dialect_options": options})


def tables_of(engine: sa.Engine) -> dict[str, dict[str, Any]]:
    """Return a description of each table as the database reports it. The order of columns does not matter."""
    looked, found = sa.inspect(engine), {}
    for name in set(looked.get_table_names()) - {"alembic_version"}:
        columns = {column["name"]: repr(column) for column in looked.get_columns(name)}
        indexes = {index["name"]: described(index) for index in looked.get_indexes(name)}
        found[name] = {
            "columns": columns,
            "indexes": indexes,
            "unique": {repr(sorted(each["column_names"])) for each in looked.get_unique_constraints(name)},
            "keys": [repr(key) for key in (looked.get_pk_constraint(name), *looked.get_foreign_keys(name))],
        }
    return found
