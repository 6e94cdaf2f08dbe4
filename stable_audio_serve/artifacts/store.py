"""The seam to the places for files. Keys are made by `artifacts.keys`, never by clients."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from stable_audio_serve.core.generation import MadeOn
from stable_audio_serve.core.ids import ArtifactKey
from stable_audio_serve.core.sound import ClipFacts

BackendName = Literal["local", "s3"]

# How many files one call of `list_folder` returns at most.
MAX_LISTED = 1000

# What a probe writes at most: enough to run into a limit, too little to push others into it.
PROBE_BYTES = 4_194_304

# Returns the pieces of a file from its start. It may be called more than once, and the bytes are always the same.
Chunks = Callable[[], Iterable[bytes]]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file at rest, as it was when it was put. `sha256` is hexadecimal; `clips` says what can be heard in it and
    `made_on` where a model made it, if known.
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
    """Some of the objects of a folder; `next_cursor` leads to the others, if there are any."""

    objects: tuple[StoredObject, ...]
    next_cursor: str | None


class ArtifactStore(Protocol):
    """Stores files. A file is either there in full or not there at all."""

    @property
    def backend_name(self) -> BackendName:
        """The kind of store, as clients see it."""
        ...

    async def put(self, key: ArtifactKey, chunks: Chunks, *, media_type: str, file_name: str) -> StoredFile:
        """Write a file. Raises StorageError, StorageFullError; then, and when cancelled, nothing is left behind.

        The sweeper removes what cannot be removed at that moment.
        """
        ...

    def read(self, file: StoredFile) -> AsyncGenerator[bytes]:
        """Returns the file in chunks. The last one comes only when the whole matches what was put.

        Raises FileNotFoundError before the first chunk when it is gone, StorageError, DamagedFileError.
        """
        ...

    async def delete(self, key: ArtifactKey) -> None:
        """Remove a file; it is no error when it is gone already. Raises StorageError."""
        ...

    async def probe(self, num_bytes: int) -> None:
        """Check, at little cost, whether a file of that size could be written now. Raises StorageError if not.

        Where it could never fit, some free room is enough.
        """
        ...

    async def close(self) -> None:
        """Start no new work."""
        ...

    def check(self) -> None:
        """Write a file and read it back, within ten seconds. Blocking. Raises ConfigError naming the wrong settings."""
        ...

    def url(self, file: StoredFile) -> str | None:
        """Returns a link that needs no server of ours, None if there is none. Blocking. Raises StorageError."""
        ...

    def bucket_key(self, file: StoredFile) -> str | None:
        """Returns the whole key of the file in its bucket, None where there is no bucket."""
        ...

    def require_place(self) -> None:
        """Raises StoreMovedError when files are not where they were, as far as this process can see. Blocking."""
        ...

    def claim(self, owner: str) -> float | None:
        """Claim it for owner if unclaimed. Returns when, in Unix seconds, or None if another's. Blocking.

        Files from before the claim are not the owner's. Raises StorageError.
        """
        ...

    def fetch(self, key: ArtifactKey, *, max_bytes: int) -> bytes | None:
        """Returns a small file whose digest nobody noted, None if there is none. Blocking.

        Raises StorageError, DamagedFileError for a larger one.
        """
        ...

    def list_folder(self, folder: str, *, cursor: str | None = None, limit: int = MAX_LISTED) -> ObjectPage:
        """Returns the files directly in a folder of `keys` whose keys are ours. Blocking. Raises StorageError."""
        ...

    def sweep_unfinished(self, *, before: float) -> int:
        """Remove files that dead writers left unfinished before this Unix time. Returns how many. Blocking.

        Raises StorageError.
        """
        ...
