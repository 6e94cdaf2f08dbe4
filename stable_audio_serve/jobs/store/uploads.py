"""Count the bytes of files that each client has uploaded, so that no client fills the storage.

The files themselves are in the artifact store. The methods block, so call them from worker threads. Every method raises
StorageError.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection

import sqlalchemy as sa

from stable_audio_serve.core.errors import UploadQuotaError
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.tables import UPLOADS

MAX_TICKET_BYTES = 1_073_741_824  # limit for the parts of one announced upload (a "ticket") together

_uploads = UPLOADS.c


class Uploads:
    """Records the sizes of uploaded files and parts of files. The caller gives each a unique name."""

    def __init__(self, database: Database, *, max_bytes: int, life_s: float) -> None:
        """The files of a client may have up to `max_bytes` together.

        A file counts for `life_s` seconds, or until `forget` is called.
        """
        self._database = database
        self._max_bytes = max_bytes
        self._life_s = life_s

    def add(self, name: str, *, client: str, num_bytes: int, ticket: str, instead_of: Collection[str] = ()) -> None:
        """Count a file that belongs to the announced upload `ticket`.

        If files with this name or with a name in `instead_of` were counted, this file replaces them. Raises
        UploadQuotaError if the client or the announced upload would exceed its limit. Then nothing changes.
        """
        # The lock lets only one `add` of a client run at a time. Two at once could together exceed the limit.
        lock = zlib.crc32(client.encode())
        with self._database.writing_alone(lock) as connection:
            connection.execute(sa.delete(UPLOADS).where(_uploads.expires_at <= self._database.now))
            connection.execute(sa.delete(UPLOADS).where(_uploads.name.in_([name, *instead_of])))
            row = {"name": name, "ticket": ticket, "client": client, "num_bytes": num_bytes}
            connection.execute(sa.insert(UPLOADS).values(row | {"expires_at": self._database.now + self._life_s}))
            self._require_room(connection, _uploads.client == client, most=self._max_bytes, limit=_CLIENT_LIMIT)
            self._require_room(connection, _uploads.ticket == ticket, most=MAX_TICKET_BYTES, limit=_TICKET_LIMIT)

    def forget(self, name: str) -> None:
        """Stop counting the file with this name, because it was not stored."""
        with self._database.writing() as connection:
            connection.execute(sa.delete(UPLOADS).where(_uploads.name == name))

    def _require_room(
        self, connection: sa.Connection, condition: sa.ColumnElement[bool], *, most: int, limit: str
    ) -> None:
        total = sa.select(sa.func.coalesce(sa.func.sum(_uploads.num_bytes), 0)).where(condition)
        if connection.execute(total).scalar_one() > most:
            raise UploadQuotaError(f"upload: exceeds the limit of {most} bytes {limit}")


_CLIENT_LIMIT = "of stored files per client (storage.max_bytes_per_key); old files expire"
_TICKET_LIMIT = "per upload"
