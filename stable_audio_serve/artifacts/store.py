"""The seam to wherever files are kept. Keys are made by us (`artifacts.keys`), never by clients."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from stable_audio_serve.core.ids import ArtifactKey
from stable_audio_serve.core.sound import ClipFacts

BackendName = Literal["local", "s3"]

# What a probe writes at most: enough to meet a limit, and not so much that others do.
PROBE_BYTES = 4_194_304

# The pieces of a file from its start; it may be called more than once, and always gives the same bytes.
Chunks = Callable[[], Iterable[bytes]]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file at rest, as it was when it was put; `sha256` is hexadecimal. `clips` is what can be heard in it, once
    whoever made it has said so."""

    key: ArtifactKey
    media_type: str
    file_name: str
    num_bytes: int
    sha256: str
    clips: tuple[ClipFacts, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What lies under a key; `modified_at` is Unix time in seconds."""

    key: ArtifactKey
    num_bytes: int
    modified_at: float


@dataclass(frozen=True, slots=True)
class ObjectPage:
    """Some of the objects of a folder; `next_cursor` leads to the others, if any."""

    objects: tuple[StoredObject, ...]
    next_cursor: str | None


class ArtifactStore(Protocol):
    """Keeps files. A file is either there in full or not there at all."""

    @property
    def backend_name(self) -> BackendName:
        """What kind of store this is, as clients are told."""
        ...

    async def put(self, key: ArtifactKey, chunks: Chunks, *, media_type: str, file_name: str) -> StoredFile:
        """Write a file. Raises StorageError, StorageFullError; then, and when cancelled, nothing is left behind.

        What cannot be removed at that moment is left to the sweeper.
        """
        ...

    def read(self, file: StoredFile) -> AsyncGenerator[bytes]:
        """The file in chunks; the last one comes only when the whole is what was put.

        Raises FileNotFoundError before the first chunk when it is gone, StorageError, DamagedFileError.
        """
        ...

    async def delete(self, key: ArtifactKey) -> None:
        """Remove a file; it is no error when it is gone already. Raises StorageError."""
        ...

    async def probe(self, num_bytes: int) -> None:
        """Find out, at little cost, whether a file of that size could be kept now. Raises StorageError otherwise.

        A place that could never hold it is taken to have enough room if it has some.
        """
        ...

    async def close(self) -> None:
        """Begin nothing new."""
        ...

    # Blocking: for worker threads, and for the start

    def check(self) -> None:
        """Write a file and read it back, within ten seconds. Raises ConfigError naming the settings at fault."""
        ...

    def url(self, file: StoredFile) -> str | None:
        """Where clients can fetch the file without us; None when they cannot. Raises StorageError."""
        ...

    def bucket_key(self, file: StoredFile) -> str | None:
        """The whole key of the file in its bucket; None where there are no buckets."""
        ...

    def require_place(self) -> None:
        """Raise StoreMovedError when files are not where they were, as far as that can be seen from here."""
        ...

    def claim(self, owner: str) -> float | None:
        """Since when this place is the owner's, Unix seconds; None when it is another's. What is nobody's is taken.

        Files that were here before are not the owner's either. Raises StorageError.
        """
        ...

    def list_folder(self, folder: str, *, cursor: str | None = None) -> ObjectPage:
        """What lies directly in one of `artifacts.keys.FOLDERS` under keys of ours. Raises StorageError."""
        ...

    def sweep_unfinished(self, *, older_than_s: float) -> int:
        """Remove what writers that died left unfinished, begun that long ago; how many. Raises StorageError."""
        ...
