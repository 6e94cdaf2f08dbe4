"""Published files: with a file's random id, anyone can download the file without a key.

This module stores only the ids and descriptions of files. `artifacts` stores the bytes.
"""

from __future__ import annotations

import secrets

import sqlalchemy as sa

from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.core.errors import ConflictError
from stable_audio_serve.jobs.store import codec
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.tables import FILES


class PublishedFiles:
    """The published files of one job database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, file_id: str) -> StoredFile | None:
        with self._database.reading() as connection:
            text = connection.execute(sa.select(FILES.c.file).where(FILES.c.id == file_id)).scalar()
        return None if text is None else codec.load_file(text)

    def publish(self, file: StoredFile, *, file_id: str | None = None) -> str:
        """Publish a file under the id `file_id`, or if that is None, under a random id. Returns the id.

        Raises ConflictError if the id is in use, and StorageError.
        """
        file_id = file_id or secrets.token_hex(16)
        with self._database.writing() as connection:
            if not self._insert(connection, file, file_id=file_id):
                raise ConflictError("a file with this id exists already")
        return file_id

    def publish_in(self, connection: sa.Connection, file: StoredFile, *, file_id: str) -> None:
        """Publish a file under the id `file_id`, in the caller's transaction. The id must be new."""
        self._insert(connection, file, file_id=file_id)

    def _insert(self, connection: sa.Connection, file: StoredFile, *, file_id: str) -> bool:
        row = {"id": file_id, "key": file.key, "file": codec.dump(file), "created_at": self._database.now}
        insert = self._database.insert(FILES).values(row).on_conflict_do_nothing().returning(FILES.c.id)
        return connection.execute(insert).first() is not None
