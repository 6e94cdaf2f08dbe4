"""Async access to jobs and their files for the dialects. Every ingress replica may call every method."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from stable_audio_serve.artifacts.keys import file_key, upload_key
from stable_audio_serve.artifacts.store import ArtifactStore, Chunks, StoredFile
from stable_audio_serve.core.errors import StableAudioError, StorageError
from stable_audio_serve.core.generation import MadeOn
from stable_audio_serve.core.ids import ClientId, JobId
from stable_audio_serve.core.sound import ClipFacts
from stable_audio_serve.jobs.job import Contract, Job, JobEvent, JobRef, JobSpec, State
from stable_audio_serve.jobs.overview import JobsWatch
from stable_audio_serve.jobs.store.client_jobs import Added, CancelOutcome, Page
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.watch import StoreWatch

_MOST_DELETIONS_AT_ONCE = 8
_MOST_PER_TRANSACTION = 32  # one transaction of this size takes about 20 ms

__all__ = ["CancelOutcome", "JobQueue"]


class JobQueue:
    """Jobs for clients. `wake` makes runners look for work; if it fails, they find the job at their next poll."""

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
        self.overview = JobsWatch(store.operators)
        self._submitting: asyncio.Task[None] | None = None
        self._submitted: list[tuple[JobSpec, asyncio.Future[Added]]] = []

    async def submit(self, spec: JobSpec) -> Job:
        """Add a job without id or idempotency key of the client, so that it cannot be a repeat. Returns the job."""
        return (await self.add(spec)).job

    async def add(self, spec: JobSpec) -> Added:
        """Add a job. Once this returns, the job survives the death of any process.

        A repeated request returns the job that it added first. The upload of a job that is not added is deleted. Raises
        ConflictError, OverloadedError, QuotaError and StorageError.
        """
        try:
            added = await self._add(spec)
        except StorageError:  # the job may have been added, and only the answer was lost
            raise
        except StableAudioError:
            await self.drop(spec)
            raise
        if added.is_new:
            self.wake()
        else:
            await self.drop(spec)
        return added

    async def _add(self, spec: JobSpec) -> Added:
        """Add the job. One transaction adds all jobs that were submitted during the previous transaction."""
        future = asyncio.get_running_loop().create_future()
        self._submitted.append((spec, future))
        if self._submitting is None or self._submitting.done():
            self._submitting = asyncio.create_task(self._add_submitted())
        return await future

    async def _add_submitted(self) -> None:
        while self._submitted:
            submitted, self._submitted = (
                self._submitted[:_MOST_PER_TRANSACTION],
                self._submitted[_MOST_PER_TRANSACTION:],
            )
            outcomes: Sequence[Added | Exception]
            try:
                outcomes = await asyncio.to_thread(self.store.clients.add_all, [spec for spec, _ in submitted])
            except Exception as error:  # noqa: BLE001  # raised in every caller
                outcomes = [error] * len(submitted)
            for (_, future), outcome in zip(submitted, outcomes, strict=True):
                if future.done():  # the caller was cancelled
                    continue
                if isinstance(outcome, Exception):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)

    async def list_own(
        self, contract: Contract, client: ClientId, *, state: State | None, cursor: str | None, limit: int
    ) -> Page:
        """Return a client's jobs, newest first. Raises InvalidRequestError for a cursor that is not this client's."""
        find = partial(self.store.clients.list_own, contract, client, state=state, cursor=cursor, limit=limit)
        return await asyncio.to_thread(find)

    async def events(self, ref: JobRef, *, after: int = 0) -> tuple[JobEvent, ...]:
        """Return the job's events after the one with the id `after`."""
        return await asyncio.to_thread(partial(self.store.clients.events, ref, after=after))

    async def get(self, ref: JobRef) -> Job | None:
        """Return the job, None if this client has no such job in this contract."""
        return await asyncio.to_thread(self.store.clients.get, ref)

    async def find_unguessable(self, contract: Contract, job_id: JobId) -> Job | None:
        """Return any client's job with this id, unless the client chose the id. For links that need no key."""
        return await asyncio.to_thread(self.store.clients.find_unguessable, contract, job_id)

    async def position(self, job: Job) -> int:
        """Return how many jobs of the same model start before this queued job; 0 means that it is next."""
        return await asyncio.to_thread(self.store.clients.position, job)

    async def cancel(self, ref: JobRef) -> tuple[CancelOutcome, Job | None]:
        """End a waiting job (outcome "removed"), or ask the runner of a running job to stop it (outcome "requested").

        Returns the outcome and the job afterwards.
        """
        outcome, job = await asyncio.to_thread(self.store.clients.cancel, ref)
        if outcome == "removed" and job is not None:
            await self.drop(job.spec)
        if outcome in ("removed", "requested"):
            self.wake()
        return outcome, job

    async def forget_dead_letters(self, numbers: Collection[int]) -> Sequence[int]:
        """Delete dead letters and their uploads. Returns the numbers of the deleted dead letters."""
        forgotten, keys = await asyncio.to_thread(self.store.dead_letters.delete, numbers)
        for start in range(0, len(keys), _MOST_DELETIONS_AT_ONCE):
            deletions = map(self.artifacts.delete, keys[start : start + _MOST_DELETIONS_AT_ONCE])
            await asyncio.gather(*deletions, return_exceptions=True)  # the sweeper deletes what remains
        return forgotten

    async def drop(self, spec: JobSpec) -> None:
        """Delete the upload of a job that is not added."""
        if spec.upload is not None:
            with suppress(StorageError):  # the sweeper deletes it later
                await self.artifacts.delete(spec.upload.file.key)

    async def put_upload(self, chunks: Chunks, *, media_type: str, file_name: str) -> StoredFile:
        """Store a client's file for a job that will be submitted. Raises StorageError."""
        return await self.artifacts.put(upload_key(), chunks, media_type=media_type, file_name=file_name)

    async def publish(
        self,
        chunks: Chunks,
        *,
        media_type: str,
        file_name: str,
        file_id: str | None = None,
        clips: tuple[ClipFacts, ...] = (),
        made_on: MadeOn | None = None,
    ) -> tuple[str, StoredFile]:
        """Store a file that anyone with the link can download. Raises StorageError.

        Returns the id in the link, which is `file_id` or else random, and the file.
        """
        file = await self.artifacts.put(file_key(), chunks, media_type=media_type, file_name=file_name)
        file = replace(file, clips=clips, made_on=made_on)
        # Do not delete the file after an error: it may be published, and only the answer was lost. If it is not, the
        # sweeper deletes it.
        return await asyncio.to_thread(lambda: self.store.files.publish(file, file_id=file_id)), file

    async def find_file(self, file_id: str) -> StoredFile | None:
        """Return a published file, or the finished audio of a job (`JobResult.file_id`)."""
        return await asyncio.to_thread(self.store.files.find, file_id)

    def read(self, file: StoredFile) -> AsyncGenerator[bytes]:
        """Return the file in chunks, see `ArtifactStore.read`."""
        return self.artifacts.read(file)

    async def close(self) -> None:
        """Close the database and the artifact store."""
        await self.watch.close()
        await self.overview.close()
        await self.artifacts.close()
        await asyncio.to_thread(self.store.database.close)
