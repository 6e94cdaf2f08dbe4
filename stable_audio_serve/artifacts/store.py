"""The seam to wherever files are kept. Keys are made by us, never by clients."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file at rest; `sha256` is hexadecimal."""

    key: str
    media_type: str
    file_name: str
    num_bytes: int
    sha256: str


class ArtifactStore(Protocol):
    """Keeps files. A file is either there in full or not there at all."""

    async def put(self, key: str, chunks: Iterable[bytes], *, media_type: str, file_name: str) -> StoredFile:
        """Write a file. Raises StorageError; then nothing is left behind."""
        ...

    def read(self, key: str) -> AsyncIterator[bytes]:
        """The file in chunks. Raises FileNotFoundError before the first chunk when it is gone."""
        ...

    async def delete(self, key: str) -> None:
        """Remove a file; it is no error when it is gone already."""
        ...
