"""Published files and uploaded files in the job database: the ids and descriptions of published files, and how many
bytes each client has uploaded. `artifacts` stores the bytes of both.

The methods block, so call them from worker threads. Every method raises StorageError.
"""

from __future__ import annotations

import secrets
import zlib

import sqlalchemy as sa

from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.core.errors import ConflictError, UploadQuotaError
from stable_audio_serve.jobs.store import codec
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.tables import FILES, UPLOADS

_uploads = UPLOADS.c


class PublishedFiles:
    """The published files of one job database. With a file's random id, anyone can download the file without a key."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, file_id: str) -> StoredFile | None:
        with self._database.reading() as connection:
            text = connection.execute(sa.select(FILES.c.file).where(FILES.c.id == file_id)).scalar()
        return None if text is None else codec.load(StoredFile, text)

    def publish(self, file: StoredFile, *, file_id: str | None = None) -> str:
        """Publish a file under the id `file_id`, or if that is None, under a random id. Returns the id.

        Raises ConflictError if the id is in use, and StorageError.
        """
        file_id = file_id or secrets.token_hex(16)
        with self._database.writing() as connection:
            if not self.publish_in(connection, file, file_id=file_id):
                raise ConflictError("a file with this id exists already")
        return file_id

    def publish_in(self, connection: sa.Connection, file: StoredFile, *, file_id: str) -> bool:
        """Publish a file under the id `file_id`, in the caller's transaction. Returns False if the id is in use."""
        row = {"id": file_id, "key": file.key, "file": codec.dump(file), "created_at": self._database.now}
        insert = self._database.insert(FILES).values(row).on_conflict_do_nothing().returning(FILES.c.id)
        return connection.execute(insert).first() is not None


class Uploads:
    """Records the sizes of uploaded files, so that no client fills the storage. The caller chooses a unique name for
    each file.
    """

    def __init__(self, database: Database, *, max_bytes: int, life_s: float) -> None:
        """The files of a client may have up to `max_bytes` together.

        A file counts for `life_s` seconds, or until `forget` is called.
        """
        self._database = database
        self._max_bytes = max_bytes
        self._life_s = life_s

    def add(self, name: str, *, client: str, num_bytes: int) -> None:
        """Count a file. If a file with this name was counted, this one replaces it.

        Raises UploadQuotaError if the client would exceed its limit. Then nothing changes.
        """
        # The lock lets only one `add` of a client run at a time. Two at once could together exceed the limit.
        lock = zlib.crc32(client.encode())
        with self._database.writing_alone(lock) as connection:
            connection.execute(sa.delete(UPLOADS).where(_uploads.expires_at <= self._database.now))
            connection.execute(sa.delete(UPLOADS).where(_uploads.name == name))
            row = {"name": name, "client": client, "num_bytes": num_bytes}
            connection.execute(sa.insert(UPLOADS).values(row | {"expires_at": self._database.now + self._life_s}))
            total = sa.select(sa.func.sum(_uploads.num_bytes)).where(_uploads.client == client)
            if connection.execute(total).scalar_one() > self._max_bytes:
                limit = f"{self._max_bytes} bytes of stored files per client (storage.max_bytes_per_key)"
                raise UploadQuotaError(f"upload: exceeds the limit of {limit}; old files expire")

    def forget(self, name: str) -> None:
        """Stop counting the file with this name, because it was not stored."""
        with self._database.writing() as connection:
            connection.execute(sa.delete(UPLOADS).where(_uploads.name == name))
