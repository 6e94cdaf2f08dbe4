"""What a dialect may do with jobs and their files. Every method may be called on any ingress replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from stable_audio_serve.artifacts.keys import file_key, upload_key
from stable_audio_serve.artifacts.store import ArtifactStore, Chunks, StoredFile
from stable_audio_serve.core.errors import StableAudioError, StorageError
from stable_audio_serve.core.ids import ClientId, JobId
from stable_audio_serve.core.sound import ClipFacts
from stable_audio_serve.jobs.job import Contract, Job, JobEvent, JobRef, JobSpec, State
from stable_audio_serve.jobs.store.client_jobs import Added, CancelOutcome, Page
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.watch import StoreWatch

_MOST_TOGETHER = 32  # one transaction then takes about 20 ms

__all__ = ["CancelOutcome", "JobQueue"]


class JobQueue:
    """Jobs as their clients see them; whoever runs them is told by `wake`, which may be lost."""

    def __init__(
        self,
        store: JobStore,
        artifacts: ArtifactStore,
        *,
        wake: Callable[[], None] = lambda: None,
        watch: StoreWatch | None = None,
    ) -> None:
        self.store = store
        self.artifacts = artifacts
        self.wake = wake
        self.watch = watch or StoreWatch(store.database, artifacts)
        self._submitting: asyncio.Task[None] | None = None
        self._submitted: list[tuple[JobSpec, asyncio.Future[Added]]] = []

    async def submit(self, spec: JobSpec) -> Job:
        """`add` for requests that cannot be repeats."""
        return (await self.add(spec)).job

    async def add(self, spec: JobSpec) -> Added:
        """Keep a job; once this returns it will run, whatever process dies. A repeated request finds its first job.

        The upload of a job that is not kept is deleted. Raises ConflictError, OverloadedError, QuotaError and
        StorageError.
        """
        try:
            added = await self._add(spec)
        except StorageError:  # it may be kept nevertheless, only the database's answer did not arrive
            raise
        except StableAudioError:
            await self._drop_upload(spec)
            raise
        if added.is_new:
            self.wake()
        else:
            await self._drop_upload(spec)
        return added

    async def _add(self, spec: JobSpec) -> Added:
        """`store.clients.add`, in one transaction with whatever else was submitted during the one before."""
        future = asyncio.get_running_loop().create_future()
        self._submitted.append((spec, future))
        if self._submitting is None or self._submitting.done():
            self._submitting = asyncio.create_task(self._add_submitted())
        return await future

    async def _add_submitted(self) -> None:
        while self._submitted:
            submitted, self._submitted = self._submitted[:_MOST_TOGETHER], self._submitted[_MOST_TOGETHER:]
            outcomes: Sequence[Added | Exception]
            try:
                outcomes = await asyncio.to_thread(self.store.clients.add_all, [spec for spec, _ in submitted])
            except Exception as error:  # noqa: BLE001 - everybody's
                outcomes = [error] * len(submitted)
            for (_, future), outcome in zip(submitted, outcomes, strict=True):
                if future.done():  # nobody waits any more
                    continue
                if isinstance(outcome, Exception):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)

    async def list_own(
        self, contract: Contract, client: ClientId, *, state: State | None, cursor: str | None, limit: int
    ) -> Page:
        """One client's jobs, newest first. Raises InvalidRequestError for a cursor that this client was not given."""
        find = partial(self.store.clients.list_own, contract, client, state=state, cursor=cursor, limit=limit)
        return await asyncio.to_thread(find)

    async def events(self, ref: JobRef, *, after: int = 0) -> tuple[JobEvent, ...]:
        """What happened to the job since the event with the id `after`."""
        return await asyncio.to_thread(partial(self.store.clients.events, ref, after=after))

    async def get(self, ref: JobRef) -> Job | None:
        """The job as it is now; None when this client has no such job in this contract."""
        return await asyncio.to_thread(self.store.clients.get, ref)

    async def find_unguessable(self, contract: Contract, job_id: JobId) -> Job | None:
        """Anybody's job with this id, unless its client chose it: for links that need no key."""
        return await asyncio.to_thread(self.store.clients.find_unguessable, contract, job_id)

    async def position(self, job: Job) -> int:
        """How many jobs of its model will start before this queued one, 0 = next."""
        return await asyncio.to_thread(self.store.clients.position, job)

    async def cancel(self, ref: JobRef) -> tuple[CancelOutcome, Job | None]:
        """`removed` = was queued and is cancelled now; `requested` = runs, and will be told to stop. And the job."""
        outcome, job = await asyncio.to_thread(self.store.clients.cancel, ref)
        if outcome == "removed" and job is not None:
            await self._drop_upload(job.spec)
        if outcome in ("removed", "requested"):
            self.wake()
        return outcome, job

    async def _drop_upload(self, spec: JobSpec) -> None:
        if spec.upload is not None:
            with suppress(StorageError):  # then it is an orphan, and swept as one
                await self.artifacts.delete(spec.upload.file.key)

    async def put_upload(self, chunks: Chunks, *, media_type: str, file_name: str) -> StoredFile:
        """Keep a client's file for a job about to be submitted. Raises StorageError."""
        return await self.artifacts.put(upload_key(), chunks, media_type=media_type, file_name=file_name)

    async def publish(
        self,
        chunks: Chunks,
        *,
        media_type: str,
        file_name: str,
        file_id: str | None = None,
        clips: tuple[ClipFacts, ...] = (),
    ) -> tuple[str, StoredFile]:
        """Keep a file for whoever has its link: its id, unguessable unless given, for `links`. Raises StorageError."""
        file = await self.artifacts.put(file_key(), chunks, media_type=media_type, file_name=file_name)
        file = replace(file, clips=clips)
        # When that fails the file stays, to be swept: it may be published, only the database's answer did not arrive.
        return await asyncio.to_thread(lambda: self.store.files.publish(file, file_id=file_id)), file

    async def find_file(self, file_id: str) -> StoredFile | None:
        """A published file, or the finished audio of a job (`JobResult.file_id`)."""
        return await asyncio.to_thread(self.store.files.find, file_id)

    def read(self, file: StoredFile) -> AsyncGenerator[bytes]:
        """The file in chunks, see `ArtifactStore.read`."""
        return self.artifacts.read(file)

    async def close(self) -> None:
        """Close the database, and begin nothing new with files."""
        await self.watch.close()
        await self.artifacts.close()
        await asyncio.to_thread(self.store.database.close)
