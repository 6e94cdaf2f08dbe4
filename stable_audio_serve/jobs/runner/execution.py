"""Execute one job: decode its source audio, generate, encode the result and store the file.

The state of the job is not changed here (see `attempt`).
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import IO

from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.audio import workers
from stable_audio_serve.audio.finish import ClipOrigin, FileOrder, finish
from stable_audio_serve.audio.workers import AudioWorkers
from stable_audio_serve.core.backend import Backend
from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.core.failpoints import failpoint
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, Progress, SourceAudio
from stable_audio_serve.core.private_files import needing_room, temporary_file
from stable_audio_serve.core.settings import ApiSettings
from stable_audio_serve.jobs.job import Job, JobResult, JobSpec, JobUpload
from stable_audio_serve.jobs.runner.files import JobFiles
from stable_audio_serve.jobs.runner.long_pieces import LongPieces
from stable_audio_serve.jobs.runner.patient_calls import PatientCalls
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.runner_jobs import GENERATED, Report

_LEAST_START_S = 0.001


class JobExecutor:
    """Executes the jobs of a runner. Limits the memory that decoded source audio takes in all jobs together."""

    def __init__(
        self,
        backend: Backend,
        files: JobFiles,
        *,
        store: JobStore,
        calls: PatientCalls,
        limits: ApiSettings,
    ) -> None:
        """`calls` repeats a call of the job store until the database answers."""
        self._backend = backend
        self._files = files
        self._limits = limits
        self._source_bytes = ByteBudget(workers.MAX_SOURCE_BYTES)
        self._audio = AudioWorkers(own_rates_hz={card.sample_rate_hz for card in backend.catalog})
        self._pieces = LongPieces(backend, files, store=store, audio=self._audio, limited=self._limited, calls=calls)

    async def execute(self, job: Job, report: Callable[[Report], None]) -> JobResult:
        """Run the job, store its audio file, and return the result. Progress is passed to `report`.

        If the call is cancelled or raises an error, the job gets no audio file. Raises subclasses of StableAudioError.
        """
        spec = job.spec

        def on_progress(progress: Progress) -> None:
            # "done" only means that the engine has finished. The file is not stored yet.
            if progress.stage != "done":
                fraction = progress.fraction * GENERATED
                report(Report(job, progress.stage, fraction, engine_position=progress.queue_position))

        if not job.is_readable:
            raise StorageError("the job was written by another version of this server, which can run it")
        # Raises UnknownModelError. This server may lack the model, if another server accepted the job.
        self._backend.catalog.find(spec.model)
        if spec.sections:
            result = await self._pieces.make(job, report)
            failpoint("after_upload")
            return result
        begun_at = time.monotonic()
        async with self._source_bytes.hold(spec.upload.decoded_bytes if spec.upload else 0):
            request = self._limited(await self._with_source(spec), job, waited_s=time.monotonic() - begun_at)
            started_at = time.monotonic()
            generated = await self._backend.generate(spec.model, request, on_progress=on_progress)
            inference_s = time.monotonic() - started_at
            del request  # frees the memory of the source audio
        report(Report(job, "storing", GENERATED))
        stored, sample_rate_hz = await self._store(job, generated)
        failpoint("after_upload")
        return JobResult(
            file=stored,
            file_id=secrets.token_hex(16),
            sample_rate_hz=sample_rate_hz,
            seeds=generated.seeds,
            inference_s=inference_s,
        )

    async def close(self) -> None:
        """Wait for running work, then stop threads and processes."""
        await self._audio.close()

    async def _store(self, job: Job, result: GenerationResult) -> tuple[StoredFile, int]:
        """Encode and store the job's file. Returns the file and its sample rate."""
        spec = job.spec
        order = FileOrder(
            spec.peaks,
            encoding=spec.encoding,
            stem=spec.file_stem,
            with_manifest=spec.with_manifest,
            origin=ClipOrigin(spec.request, spec.sources) if spec.with_recipe or spec.with_manifest else None,
            finishing=spec.finishing,
        )
        finished = await self._audio.run_encoding(partial(finish, result, order))
        file = finished.file
        suffix = f".{spec.encoding.file_format}" if len(result.audio) == 1 else "-batch.zip"
        stored = await self._files.put(
            job, file.chunks, name=spec.file_stem + suffix, media_type=file.media_type, num_bytes=file.num_bytes
        )
        return replace(stored, clips=finished.clips, made_on=result.made_on), finished.sample_rate_hz

    def _limited(self, request: GenerationRequest, job: Job, *, waited_s: float = 0.0) -> GenerationRequest:
        """Return the request with the job's time limits. `waited_s` is the time since the job was leased.

        In the first attempt, the job's `start_within_s` also limits how long the request waits in the engine's queue.
        It does not if the lease began later: then the job started in time before, or an operator retries it.
        """
        start_within_s = None
        if job.spec.start_within_s is not None and job.attempts <= 1 and job.started_at is not None:
            # The two times are from the database's clock, which may differ from this machine's.
            left_s = job.spec.start_within_s - (job.started_at - job.created_at).total_seconds()
            if left_s > 0:
                start_within_s = max(left_s - waited_s, _LEAST_START_S)
        deadline_s = request.deadline_s or self._limits.max_deadline_s
        return replace(request, request_id=job.spec.id, deadline_s=deadline_s, start_within_s=start_within_s)

    async def _with_source(self, spec: JobSpec) -> GenerationRequest:
        if spec.upload is None:
            return spec.request
        source = await self._decode(spec.upload)
        if spec.upload.role == "init":
            return replace(spec.request, init_audio=source)
        return replace(spec.request, inpaint_audio=source, init_audio=source if spec.upload.is_start else None)

    async def _decode(self, upload: JobUpload) -> SourceAudio:
        with temporary_file() as copy:
            async with aclosing(self._files.read(upload.file)) as chunks:
                async for chunk in chunks:
                    await self._audio.run_decoding(partial(_write, copy, chunk))
            return await self._audio.decode(copy, max_s=upload.max_s)


def _write(file: IO[bytes], chunk: bytes) -> None:
    with needing_room():
        file.write(chunk)


class ByteBudget:
    """Limits the sum of the bytes that tasks hold. A task may exceed the limit if no other task holds bytes.

    Use it on one event loop only.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        # Only the first of the waiting tasks checks whether there is room. Otherwise, tasks that need few bytes could
        # go first again and again, and a task that needs many would never run.
        self._turn = asyncio.Lock()
        self._released = asyncio.Event()

    @asynccontextmanager
    async def hold(self, num_bytes: int) -> AsyncIterator[None]:
        """Wait until there is room for `num_bytes`, and hold them until the context ends."""
        async with self._turn:
            while self._used and self._used + num_bytes > self._limit:
                self._released.clear()
                await self._released.wait()
            self._used += num_bytes
        try:
            yield
        finally:
            self._used -= num_bytes
            self._released.set()
