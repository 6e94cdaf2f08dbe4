"""The interface of file stores. Only `artifacts.keys` creates keys, never clients."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from stable_audio_serve.core.generation import MadeOn
from stable_audio_serve.core.ids import ArtifactKey
from stable_audio_serve.core.sound import ClipFacts

BackendName = Literal["local", "s3"]

# Most files that one call of `list_folder` returns.
MAX_LISTED = 1000

# Most bytes that a probe writes: enough to hit a quota, too few to fill the disk for others.
PROBE_BYTES = 4_194_304

# Returns the chunks of a file from its start. May be called several times and always yields the same bytes.
Chunks = Callable[[], Iterable[bytes]]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A stored file, as it was when it was put. `sha256` is hexadecimal. `clips` are measurements of its audio and
    `made_on` is the device that generated it, both if known.
    """

    key: ArtifactKey
    media_type: str
    file_name: str
    num_bytes: int
    sha256: str
    clips: tuple[ClipFacts, ...] = ()
    made_on: MadeOn | None = None


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A file found under a key; `modified_at` is Unix time in seconds."""

    key: ArtifactKey
    num_bytes: int
    modified_at: float


@dataclass(frozen=True, slots=True)
class ObjectPage:
    """Some objects of a folder. `next_cursor` leads to the next page, None on the last one."""

    objects: tuple[StoredObject, ...]
    next_cursor: str | None


class ArtifactStore(Protocol):
    """Stores files. A file is either complete or absent."""

    @property
    def backend_name(self) -> BackendName:
        """The kind of store, as clients see it."""
        ...

    async def put(self, key: ArtifactKey, chunks: Chunks, *, media_type: str, file_name: str) -> StoredFile:
        """Write a file. Raises StorageError, StorageFullError. Leaves nothing behind on an error or a cancellation.

        The sweeper removes what cannot be removed at that moment.
        """
        ...

    def read(self, file: StoredFile) -> AsyncGenerator[bytes]:
        """Returns the file in chunks. Yields the last chunk only if the whole file matches its digest.

        Raises FileNotFoundError before the first chunk when the file does not exist, StorageError, DamagedFileError.
        """
        ...

    async def delete(self, key: ArtifactKey) -> None:
        """Remove a file. A missing file is no error. Raises StorageError."""
        ...

    async def probe(self, num_bytes: int) -> None:
        """Check, at little cost, whether a file of this size could be written now. Raises StorageError if not.

        For a file larger than the store could ever hold, checks for some free space only.
        """
        ...

    async def close(self) -> None:
        """Stop accepting work."""
        ...

    def check(self) -> None:
        """Write a file and read it back, within ten seconds. Blocking. Raises ConfigError naming the wrong settings."""
        ...

    def url(self, file: StoredFile) -> str | None:
        """Returns a link that bypasses this server, None if there is none. Blocking. Raises StorageError."""
        ...

    def bucket_key(self, file: StoredFile) -> str | None:
        """Returns the full key of the file in its bucket, None without a bucket."""
        ...

    def require_place(self) -> None:
        """Raise StoreMovedError when this process can see that the store was moved or replaced. Blocking."""
        ...

    def claim(self, owner: str) -> float | None:
        """Claim the store for `owner` unless it has an owner. Returns the time of the claim, Unix seconds. Blocking.

        Returns None when the store has another owner. Files from before the claim do not belong to the owner. Raises
        StorageError.
        """
        ...

    def fetch(self, key: ArtifactKey, *, max_bytes: int) -> bytes | None:
        """Returns a small file without checking a digest, None if it does not exist. Blocking.

        Raises StorageError, and DamagedFileError for a file above `max_bytes`.
        """
        ...

    def list_folder(self, folder: str, *, cursor: str | None = None, limit: int = MAX_LISTED) -> ObjectPage:
        """Returns the files directly in `folder`, without foreign keys. Blocking. Raises StorageError."""
        ...

    def sweep_unfinished(self, *, before: float) -> int:
        """Remove unfinished files of dead writers from before this Unix time. Returns their number. Blocking.

        Raises StorageError.
        """
        ...
