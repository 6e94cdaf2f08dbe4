"""Async access to jobs and their files, for the HTTP APIs. Every method works in every ingress replica."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from dataclasses import replace
from functools import partial
from typing import TypeVar
from weakref import WeakValueDictionary

from stable_audio_serve.artifacts.keys import new_key
from stable_audio_serve.artifacts.store import ArtifactStore, Chunks, StoredFile
from stable_audio_serve.core.errors import ConflictError, StableAudioError, StorageError, StorageFullError
from stable_audio_serve.core.generation import MadeOn
from stable_audio_serve.core.ids import ClientId, JobId, current_client
from stable_audio_serve.core.sound import ClipFacts
from stable_audio_serve.jobs.job import Contract, FinishedSection, Job, JobEvent, JobRef, JobSpec, State
from stable_audio_serve.jobs.overview import JobsWatch
from stable_audio_serve.jobs.store.client_jobs import Added, CancelOutcome, Page
from stable_audio_serve.jobs.store.health import StoreWatch
from stable_audio_serve.jobs.store.job_store import JobStore

_MOST_PER_TRANSACTION = 32  # jobs added in one transaction; 32 take about 20 ms

_NUM_READERS, _NUM_WRITERS = 8, 4
_WRITE_TIMEOUT_S = 20.0  # longer than a transaction waits for other processes' transactions on SQLite
_READ_TIMEOUT_S = 20.0

__all__ = ["CancelOutcome", "JobQueue"]

T = TypeVar("T")


class JobQueue:
    """Adds, finds and cancels the jobs of clients.

    `wake` is called when there is work for the runners. Runners that this call does not reach find the work at their
    next poll.
    """

    def __init__(
        self,
        store: JobStore,
        artifacts: ArtifactStore,
        *,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.store = store
        self.artifacts = artifacts
        self.wake = wake
        self.watch = StoreWatch(store.database, artifacts)
        self.overview = JobsWatch(store.operators)
        self._writers = ThreadPoolExecutor(_NUM_WRITERS, thread_name_prefix="job-writes")
        self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="job-reads")
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._submitting: asyncio.Task[None] | None = None
        self._submitted: list[tuple[JobSpec, asyncio.Future[Added], Context]] = []

    async def submit(self, spec: JobSpec) -> Job:
        """Add a job for which the client chose no id and no idempotency key, and return it."""
        return (await self.add(spec)).job

    async def add(self, spec: JobSpec) -> Added:
        """Add a job. When this method returns, the job is in the database, so it survives the death of any process.

        If the client has sent the same request before (with the same id or idempotency key), returns the job that was
        added then, and deletes the new upload. Raises ConflictError, OverloadedError, QuotaError and StorageError. The
        upload is deleted after these errors too, unless the job may have been added although an error was raised.
        """
        try:
            added = await self._add(spec)
        except StableAudioError as error:
            # After a StorageError the job may have been added, except if the disk is full.
            if isinstance(error, StorageFullError) or not isinstance(error, StorageError):
                await self.drop(spec)
            raise
        if added.is_new:
            self.wake()
        else:
            await self.drop(spec)
        return added

    async def _add(self, spec: JobSpec) -> Added:
        """Add the job. Jobs that are submitted while a transaction runs are added together in the next one."""
        future = asyncio.get_running_loop().create_future()
        self._submitted.append((spec, future, copy_context()))
        if self._submitting is None or self._submitting.done():
            self._submitting = asyncio.create_task(self._add_submitted())
        return await future

    async def _add_submitted(self) -> None:
        while self._submitted:
            submitted, self._submitted = (
                self._submitted[:_MOST_PER_TRANSACTION],
                self._submitted[_MOST_PER_TRANSACTION:],
            )
            run = submitted[0][2].run  # log lines carry the id of the first of these requests
            outcomes: Sequence[Added | Exception]
            try:
                specs = [spec for spec, _, _ in submitted]
                outcomes = await self.write(partial(run, self.store.clients.add_all, specs))
            except Exception as error:  # noqa: BLE001  # each caller of `_add` raises the error
                outcomes = [error] * len(submitted)
            for (_, future, _), outcome in zip(submitted, outcomes, strict=True):
                if future.done():  # the task that submitted this job was cancelled
                    continue
                if isinstance(outcome, Exception):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)

    async def list_own(
        self, contract: Contract, client: ClientId, *, state: State | None, cursor: str | None, limit: int
    ) -> Page:
        """See `ClientJobs.list_own`."""
        find = partial(self.store.clients.list_own, contract, client, state=state, cursor=cursor, limit=limit)
        return await self._find(find)

    async def events(self, ref: JobRef, *, after: int = 0) -> tuple[JobEvent, ...]:
        """See `ClientJobs.events`."""
        return await self._find(partial(self.store.clients.events, ref, after=after))

    async def sections(self, ref: JobRef, *, after: int = 0) -> Sequence[FinishedSection]:
        """See `Sections.find`."""
        return await self._find(partial(self.store.sections.find, ref, after=after))

    async def get(self, ref: JobRef) -> Job | None:
        """Return the job, None if this client has no such job in this contract."""
        return await self._find(partial(self.store.clients.get, ref))

    async def find_same(self, spec: JobSpec) -> Job | None:
        """See `ClientJobs.find_same`."""
        return await self._find(partial(self.store.clients.find_same, spec))

    async def find_unguessable(self, contract: Contract, job_id: JobId) -> Job | None:
        """See `ClientJobs.find_unguessable`."""
        return await self._find(partial(self.store.clients.find_unguessable, contract, job_id))

    async def position(self, job: Job) -> int:
        """See `ClientJobs.position`."""
        return await self._find(partial(self.store.clients.position, job))

    async def cancel(self, ref: JobRef) -> tuple[CancelOutcome, Job | None]:
        """Cancel a job. Returns the outcome, and the job as it is afterwards.

        A queued job ends at once (outcome "removed"). For a running job, its runner is asked to stop it (outcome
        "requested").
        """
        outcome, job = await self.write(partial(self.store.clients.cancel, ref))
        if outcome == "removed" and job is not None:
            await self.drop(job.spec)
        if outcome in ("removed", "requested"):
            self.wake()
        return outcome, job

    async def forget_dead_letters(self, numbers: Collection[int]) -> Sequence[int]:
        """Delete dead letters (failed jobs that are kept for a retry) and their uploads.

        Dead letters are identified by number. Returns the numbers of the deleted ones.
        """
        forgotten, keys = await self.write(partial(self.store.dead_letters.delete, numbers))
        await self.artifacts.discard(*keys)
        return forgotten

    async def drop(self, spec: JobSpec) -> None:
        """Delete the upload of a job that will not run."""
        if spec.upload is not None:
            await self.artifacts.discard(spec.upload.file.key)

    async def put_upload(self, chunks: Chunks, *, media_type: str, file_name: str) -> StoredFile:
        """Store source audio that a client sent for a job, before the job is added. Raises StorageError."""
        return await self.artifacts.put(new_key("uploads"), chunks, media_type=media_type, file_name=file_name)

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

        Returns the id that the link contains, and the stored file. The id is `file_id`, or random if that is None.
        Raises ConflictError if the id is in use.
        """
        file = await self.artifacts.put(new_key("files"), chunks, media_type=media_type, file_name=file_name)
        file = replace(file, clips=clips, made_on=made_on)
        # After another StorageError the file stays, because it may have been published although the database did not
        # answer. If it was not published, the sweeper deletes it.
        try:
            return await self.write(partial(self.store.files.publish, file, file_id=file_id)), file
        except (ConflictError, StorageFullError):
            await self.artifacts.discard(file.key)
            raise

    async def find_file(self, file_id: str) -> StoredFile | None:
        """Return the published file, or the audio of a finished job, that has this id; None if there is none."""
        return await self._find(partial(self.store.files.find, file_id))

    async def _find(self, query: Callable[[], T]) -> T:
        """Run a query on a thread for queries. Raises StorageError after `_READ_TIMEOUT_S`.

        A database that has stopped answers nothing, and the limits that its server applies to queries have no effect.
        The queries of a client run one after another. Otherwise the event loop would get the results of many polls of
        one client at once, and would delay the requests of others.
        """
        run = copy_context().run  # so that log lines of the store carry the request's id
        turn = self._turns.setdefault(current_client.get(), asyncio.Lock())
        try:
            async with asyncio.timeout(_READ_TIMEOUT_S), turn:
                return await asyncio.get_running_loop().run_in_executor(self._readers, run, query)
        except TimeoutError as error:
            raise StorageError("the job database does not answer") from error

    async def write(self, transaction: Callable[[], T]) -> T:
        """Run a transaction that writes to the database on a thread for such transactions.

        While they wait for a lock of the database, reads have the other threads. Raises StorageError after
        `_WRITE_TIMEOUT_S`. The transaction may still take place then. If the caller is cancelled, it waits for the end
        of a transaction that has begun.
        """
        queued = self._writers.submit(copy_context().run, transaction)  # see `_find`
        writing = asyncio.wrap_future(queued)
        try:
            await asyncio.wait({writing}, timeout=_WRITE_TIMEOUT_S)
            if not writing.done():
                raise StorageError("the job database does not answer")
            return writing.result()
        except asyncio.CancelledError:
            if not queued.cancel():
                await asyncio.wait({writing}, timeout=_WRITE_TIMEOUT_S)
            raise
        finally:
            writing.cancel()  # also cancels `queued`; asyncio does not report the error of a transaction that goes on

    async def close(self) -> None:
        """Close the database and the artifact store."""
        await self.watch.close()
        await self.overview.close()
        await self.artifacts.close()
        await asyncio.to_thread(self.store.database.close)
        for threads in (self._readers, self._writers):
            threads.shutdown(wait=False)
