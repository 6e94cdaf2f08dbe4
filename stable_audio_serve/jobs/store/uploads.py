"""Counts the bytes that each client stores, so that no client fills the storage. `artifacts` stores the bytes.

Blocking: call from worker threads. Every method raises StorageError.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection

import sqlalchemy as sa

from stable_audio_serve.core.errors import UploadQuotaError
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.tables import UPLOADS

MAX_TICKET_BYTES = 1_073_741_824  # limit for all parts of one announced upload together

_uploads = UPLOADS.c


class Uploads:
    """The sizes of uploaded files and parts of files, by name. The caller chooses the names."""

    def __init__(self, database: Database, *, max_bytes: int, life_s: float) -> None:
        """`max_bytes` is the limit of each client. A file counts for `life_s` seconds, or until `forget` is called."""
        self._database = database
        self._max_bytes = max_bytes
        self._life_s = life_s

    def add(self, name: str, *, client: str, num_bytes: int, ticket: str, instead_of: Collection[str] = ()) -> None:
        """Count a file of the announced upload `ticket`. It replaces the file of the same name and those in
        `instead_of`.

        Raises UploadQuotaError, without any change, if the client or this upload would exceed its limit.
        """
        # Two adds of one client never run at once, because together they could exceed its limit.
        lock = zlib.crc32(client.encode())
        with self._database.writing_alone(lock) as connection:
            connection.execute(sa.delete(UPLOADS).where(_uploads.expires_at <= self._database.now))
            connection.execute(sa.delete(UPLOADS).where(_uploads.name.in_([name, *instead_of])))
            row = {"name": name, "ticket": ticket, "client": client, "num_bytes": num_bytes}
            connection.execute(sa.insert(UPLOADS).values(row | {"expires_at": self._database.now + self._life_s}))
            self._require_room(connection, _uploads.client == client, most=self._max_bytes, limit=_CLIENT_LIMIT)
            self._require_room(connection, _uploads.ticket == ticket, most=MAX_TICKET_BYTES, limit=_TICKET_LIMIT)

    def forget(self, name: str) -> None:
        """Stop counting a file that was not stored."""
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
