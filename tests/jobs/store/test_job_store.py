"""A job store's identity, which marks its files, and its secret, which signs links. With every kind of database."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from stable_audio_serve.jobs.store.database import Database, database_url
from stable_audio_serve.jobs.store.job_store import JobStore
from tests.jobs.stores import database, postgres_with_tables, store, store_url, wall

__all__ = ["database", "postgres_with_tables", "store", "store_url", "wall"]


def test_database_keeps_its_identity(store: JobStore, database: Database) -> None:
    names = {store.identity(), store.identity(), JobStore(database).identity()}
    assert [len(name) for name in names] == [32]


def test_database_keeps_its_secret(store: JobStore, database: Database) -> None:
    secrets = {store.secret(), store.secret(), JobStore(database).secret()}
    assert [len(secret) for secret in secrets] == [64]
    assert store.identity() not in secrets.pop()


def test_checkpoint_in_progress_is_not_a_replaced_file(tmp_path: Path) -> None:
    """The check for a replaced file reads SQLite's file without locks, so it may see a half-written checkpoint."""
    database, file, copy = Database(database_url(None, tmp_path)), tmp_path / "jobs.db", tmp_path / "copy.db"
    database.prepare()
    with closing(sqlite3.connect(file, check_same_thread=False)) as writer, closing(sqlite3.connect(copy)) as copied:
        writer.execute("CREATE TABLE scratch (text TEXT)")
        writer.commit()
        writer.backup(copied)
        with file.open("r+b") as written:  # a checkpoint writes the first page first
            written.write(copy.read_bytes()[:4096])
        with (
            closing(sqlite3.connect(f"file:{file}?immutable=1", uri=True)) as reader,
            pytest.raises(sqlite3.DatabaseError, match="malformed"),
        ):
            reader.execute("SELECT id FROM identity")
        finished = threading.Timer(0.2, writer.execute, ("PRAGMA wal_checkpoint(TRUNCATE)",))
        finished.start()
        database.require_same()
        finished.join()
    database.close()


def test_partial_checkpoint_is_not_a_replaced_file(tmp_path: Path) -> None:
    """A checkpoint omits pages that changed after a reader began, so the file can be shorter than its header says."""
    database, file = Database(database_url(None, tmp_path)), tmp_path / "jobs.db"
    database.prepare()
    with (
        closing(sqlite3.connect(file, isolation_level=None)) as writer,
        closing(sqlite3.connect(file, isolation_level=None)) as reader,
    ):
        writer.execute("CREATE TABLE scratch (bytes BLOB)")
        writer.execute("INSERT INTO scratch VALUES (zeroblob(20000))")
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM scratch").fetchone()
        writer.execute("UPDATE scratch SET bytes = randomblob(20000)")
        _, num_pages, num_written = writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        assert 0 < num_written < num_pages
        database.require_same()
        with database.writing() as connection:
            connection.execute(sa.text("DROP TABLE scratch"))
    database.close()


@pytest.mark.slow
def test_checkpoints_are_never_replaced_files(tmp_path: Path) -> None:
    database = Database(database_url(None, tmp_path))
    database.prepare()
    is_over = threading.Event()

    def write_and_checkpoint() -> None:
        with closing(sqlite3.connect(tmp_path / "jobs.db", isolation_level=None)) as connection:
            while not is_over.is_set():
                connection.execute("CREATE TABLE IF NOT EXISTS scratch (text TEXT)")
                connection.executemany("INSERT INTO scratch VALUES (?)", [("x" * 3000,)] * 300)
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                connection.execute("DROP TABLE scratch")
                connection.execute("VACUUM")

    writing = threading.Thread(target=write_and_checkpoint)
    writing.start()
    try:
        for _ in range(2000):
            database.require_same()
    finally:
        is_over.set()
        writing.join()
        database.close()
