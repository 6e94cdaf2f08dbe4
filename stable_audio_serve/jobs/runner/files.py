"""Store and read the files of jobs, and report to the gate when the artifact store refuses one."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from stable_audio_serve.artifacts.keys import artifact_key
from stable_audio_serve.artifacts.store import PROBE_BYTES, ArtifactStore, Chunks, StoredFile
from stable_audio_serve.core.errors import DamagedFileError, StorageError
from stable_audio_serve.core.ids import ArtifactKey
from stable_audio_serve.jobs.job import Job
from stable_audio_serve.jobs.runner.capacity import StorageGate


class JobFiles:
    """The artifact store as the jobs of a runner use it."""

    def __init__(self, artifacts: ArtifactStore, gate: StorageGate) -> None:
        self._artifacts = artifacts
        self._gate = gate

    async def put(
        self, job: Job, chunks: Chunks, *, name: str, media_type: str, num_bytes: int, key: ArtifactKey | None = None
    ) -> StoredFile:
        """Store a file of a job. Raises StorageError.

        If `key` is None, the file gets the key of the job's audio file.
        """
        spec = job.spec
        fence = job.lease.fence if job.lease else 1
        key = key or artifact_key(spec.id, name, fence=fence, id_is_chosen=spec.id_is_chosen)
        try:
            stored = await self._artifacts.put(key, chunks, media_type=media_type, file_name=spec.file_prefix + name)
        except StorageError as error:
            self._gate.note_refused(error, num_bytes=num_bytes)
            raise
        self._gate.note_stored()
        return stored

    async def read(self, file: StoredFile) -> AsyncGenerator[bytes]:
        """Yield a file in chunks, see `ArtifactStore.read`.

        The gate probes with a large file after an error, because connections may break before the end of a file.
        """
        try:
            async with aclosing(self._artifacts.read(file)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except DamagedFileError:  # concerns this file only
            raise
        except StorageError as error:
            self._gate.note_refused(error, num_bytes=PROBE_BYTES)
            raise

    async def discard(self, key: ArtifactKey) -> None:
        """Remove a file. If that fails, the sweeper removes it later."""
        await self._artifacts.discard(key)
