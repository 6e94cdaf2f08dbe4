"""Count the bytes of files that each client has uploaded, so that no client fills the storage.

The files themselves are in the artifact store. The methods block, so call them from worker threads. Every method raises
StorageError.
"""

from __future__ import annotations

import zlib

import sqlalchemy as sa

from stable_audio_serve.core.errors import UploadQuotaError
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.tables import UPLOADS

_uploads = UPLOADS.c


class Uploads:
    """Records the sizes of uploaded files. The caller chooses a unique name for each file."""

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
