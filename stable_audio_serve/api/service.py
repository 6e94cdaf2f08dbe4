"""Operations shared by the handlers of all dialects: decode uploads, run generations within limits, encode files.

Nothing here depends on the HTTP format of a dialect. Work that needs much CPU time runs on worker threads, never on the
event loop.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar
from weakref import WeakValueDictionary

from anyio import CancelScope
from starlette.datastructures import UploadFile

from stable_audio_serve.api.middleware.api_keys import ApiKeys
from stable_audio_serve.api.middleware.callers import Caller
from stable_audio_serve.api.middleware.draining import Draining
from stable_audio_serve.api.middleware.key_limits import KeyLimiter
from stable_audio_serve.api.middleware.key_ring import KeyRing
from stable_audio_serve.api.streams import EventStreams, StreamLimits, process_stops
from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.audio import workers
from stable_audio_serve.audio.encode import EncodedFile
from stable_audio_serve.audio.finish import FileOrder, FinishedFile, finish
from stable_audio_serve.audio.recipe import Recipe
from stable_audio_serve.audio.workers import AudioWorkers
from stable_audio_serve.core.adapters import AdapterLibrary, NoAdapters
from stable_audio_serve.core.backend import Backend
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.clock import SystemClock
from stable_audio_serve.core.errors import (
    CancelledRequestError,
    ConflictError,
    DeadlineExceededError,
    ForbiddenError,
    GenerationError,
    InvalidRequestError,
    InvalidUploadError,
    ModelUnavailableError,
    OverloadedError,
    QuotaError,
    StableAudioError,
    StorageError,
    StorageFullError,
    UnknownModelError,
    UploadTooLargeError,
)
from stable_audio_serve.core.generation import SEED_LIMIT, GenerationRequest, GenerationResult, Lora, Role, SourceAudio
from stable_audio_serve.core.ids import current_client
from stable_audio_serve.core.metrics import Metrics, NullMetrics
from stable_audio_serve.core.private_files import read_chunks
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.core.sound import ClipFacts
from stable_audio_serve.jobs.job import Job, JobError, JobSpec, JobUpload
from stable_audio_serve.jobs.open import open_queue
from stable_audio_serve.jobs.queue import JobQueue
from stable_audio_serve.jobs.store.client_jobs import Added

T = TypeVar("T")

# Errors of jobs that a request which waits for its job is answered with. Other errors are a GenerationError.
_JOB_ERRORS: Mapping[str, type[StableAudioError]] = {
    error.kind: error
    for error in (
        CancelledRequestError,
        DeadlineExceededError,
        InvalidRequestError,
        ModelUnavailableError,
        StorageError,
        StorageFullError,
    )
}
_BUSY_RETRY_S = 5.0
_SOURCE_MARGIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Output:
    """The content of a response: the file and its sample rate, the measurements of its clips, the generation result,
    and the encoding time.

    `recipes` has the recipe of each variation. It is empty if the response has no recipes.
    """

    file: EncodedFile
    sample_rate_hz: int
    clips: tuple[ClipFacts, ...]
    result: GenerationResult
    encode_ms: float
    recipes: tuple[Recipe, ...] = ()


class Service:
    """The operations of one application. Owns the worker threads and processes for audio."""

    def __init__(
        self,
        backend: Backend,
        settings: Settings,
        *,
        jobs: JobQueue | None = None,
        metrics: Metrics | None = None,
        stream_limits: StreamLimits | None = None,
        adapters: AdapterLibrary = NoAdapters(),
    ) -> None:
        """Without `jobs`, open the job queue of the settings. Another process runs its jobs. Raises ConfigError.

        Without `adapters`, no model has adapters.
        """
        self.backend = backend
        self.settings = settings
        self.adapters = adapters
        self.jobs = jobs or open_queue(settings, catalog=backend.catalog)
        self.metrics = metrics or NullMetrics()
        self.clock = SystemClock()
        self.keys = ApiKeys(KeyRing(settings.api, metrics=self.metrics, clock=self.clock))
        self.draining = Draining(self.clock)
        self.streams = EventStreams(self.draining, metrics=self.metrics, limits=stream_limits)
        self.limiter = KeyLimiter(self.jobs.store.database, metrics=self.metrics, clock=self.clock)
        self._audio = AudioWorkers(own_rates_hz={card.sample_rate_hz for card in backend.catalog})
        self._turns: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self._num_generating = 0
        self._source_bytes = 0

    async def close(self) -> None:
        """Wait for running work, then stop threads and processes."""
        await self._audio.close()
        await self.limiter.close()
        await self.jobs.close()

    async def decode(
        self,
        upload: UploadFile,
        card: ModelCard,
        *,
        padding_s: float | None,
        allowed_s: tuple[float, float] | None = None,
        field: str = "audio",
    ) -> SourceAudio:
        """Decode as much of an uploaded file as the model can use. Raises InvalidUploadError, UploadTooLargeError.

        `allowed_s` is the shortest and the longest duration that the whole file may have, in seconds.
        """
        self._check_size(upload, field=field)
        max_s = _usable_s(card, padding_s)
        started_at = self.clock.monotonic()
        async with self._turn("upload"):
            source = await self._audio.decode(upload.file, max_s=max_s, allowed_s=allowed_s, field=field)
        self.metrics.observe("upload_decode_ms", (self.clock.monotonic() - started_at) * 1000)
        return source

    async def read_text(self, upload: UploadFile, *, field: str) -> str | None:
        """Return the text embedded in an uploaded file, see `embedded_text.extract`. Raises the errors of `decode`."""
        self._check_size(upload, field=field)
        async with self._turn("upload"):
            return await self._audio.read_text(upload.file, field=field)

    def _turn(self, work: Literal["upload", "download"]) -> asyncio.Lock:
        """Return the lock that the current client holds while a piece of such work waits for a thread or runs.

        One upload is decoded at a time, for up to 20 s. So an upload waits for at most one upload of each other client.
        """
        return self._turns.setdefault((work, current_client.get()), asyncio.Lock())

    def _check_size(self, upload: UploadFile, *, field: str) -> None:
        limit = self.settings.api.max_upload_bytes
        if not upload.size:
            raise InvalidUploadError(f"{field}: the uploaded file is empty", field=field)
        if upload.size > limit:
            message = f"{field}: the upload is larger than {limit} bytes (api.max_upload_bytes)"
            raise UploadTooLargeError(message, field=field)

    async def decode_path(self, path: Path, *, max_s: float) -> SourceAudio:
        """Decode the first `max_s` seconds of a file that the operator provides. Raises GenerationError."""
        try:
            return await self._audio.decode_path(path, max_s=max_s)
        except (OSError, InvalidUploadError) as error:
            raise GenerationError(f"{path.name} cannot be read: {error}") from error

    async def store_upload(
        self, upload: UploadFile, source: SourceAudio, *, card: ModelCard, padding_s: float | None, role: Role
    ) -> JobUpload:
        """Store an uploaded file unchanged for a new job, which decodes it again. Raises StorageError.

        `source` is the result of `decode` for this file, model and padding.
        """
        file = await self.jobs.put_upload(
            partial(read_chunks, upload.file), media_type="application/octet-stream", file_name="upload"
        )
        return JobUpload(file, role, _usable_s(card, padding_s), source.samples.nbytes)

    async def generate(
        self, card: ModelCard, request: GenerationRequest, *, caller: Caller, started_at: float
    ) -> GenerationResult:
        """Run one request within the limits of its API key. Raises errors of `core.errors`.

        `started_at` is the time when the HTTP request arrived.
        """
        card, request = self.adapted(card, request)
        async with self.limiter.admitted(caller.key, audio_s=_audio_s(request), takes_place=True):
            budget_s = request.deadline_s or self.settings.api.default_deadline_s
            left_s = budget_s - (self.clock.monotonic() - started_at)
            if left_s <= 0:
                raise DeadlineExceededError("the time budget ran out before the generation started", field="deadline_s")
            with self._admitted(request):
                request = replace(request, client=caller.name, deadline_s=left_s)
                return await self.backend.generate(card.name, request)

    def adapted(self, card: ModelCard, request: GenerationRequest) -> tuple[ModelCard, GenerationRequest]:
        """Find the adapters that the request and its model name ask for, and return the request with their files.

        The returned card names no adapters, so a second call changes nothing. Raises InvalidRequestError with the field
        `loras` or `model`, and StorageError while an adapter's file is downloaded.
        """
        if not card.loras and not request.loras:
            return card, request
        named = tuple(map(Lora, card.loras))
        try:
            self.adapters.resolve(card, named)
        except InvalidRequestError as error:
            raise UnknownModelError(error.message, field="model", allowed=error.allowed) from error
        loras = self.adapters.resolve(card, (*named, *request.loras))
        stacking = request.lora_stacking or card.lora_stacking
        return replace(card, loras=()), replace(request, loras=loras, lora_stacking=stacking)

    async def add_job(self, spec: JobSpec, *, card: ModelCard, caller: Caller) -> Added:
        """Add a job within the limits of its API key.

        The seconds of audio count when the job is added, not when it runs. The audio of each section of a long piece
        counts when a runner makes the section. So a piece may be longer than the key's limit per minute.

        If the request was sent before, the existing job is returned, even if the request would be refused now because
        its key has reached a limit or an adapter was removed. The audio of this job does not count again.
        """
        try:
            return await self._add_job(spec, card=card, caller=caller)
        except (QuotaError, ForbiddenError, InvalidRequestError):
            try:
                earlier = await self.jobs.find_same(spec)
            finally:
                await self.jobs.drop(spec)
            if earlier is None:
                raise
            return Added(earlier, is_new=False)
        except ConflictError:
            await self.jobs.drop(spec)
            raise

    async def _add_job(self, spec: JobSpec, *, card: ModelCard, caller: Caller) -> Added:
        whole_s = audio_s = _audio_s(spec.request)
        if spec.sections:
            audio_s = 0.0
            self.limiter.require_possible(caller.key, audio_s=max(one.duration_s for one in spec.sections))
            spec = replace(spec, limits=caller.key.limits)
        _, request = self.adapted(card, spec.request)
        spec = replace(spec, request=replace(request, client=caller.name))
        async with self.limiter.admitted(
            caller.key, audio_s=audio_s, takes_place=False, metered_s=whole_s
        ) as admission:
            added = await self.jobs.add(spec)
            if not added.is_new:
                admission.give_back()
            return added

    async def run_job(self, spec: JobSpec, *, card: ModelCard, caller: Caller) -> StoredFile:
        """Add a job like `add_job`, wait for its end and return its file. If the wait is cancelled, so is the job.

        Raises an error of `_JOB_ERRORS` or GenerationError if the job fails, and StoppingError if this process stops
        first. Also raises the errors of `EventStreams.counted`.
        """
        async with self.own_job(spec, card=card, caller=caller) as job:
            try:
                async for change in self.streams.follow(self.jobs, job, finishes=True):
                    job = change.job
            finally:
                if not job.is_over:
                    await self.jobs.cancel(job.spec.ref)
        return self.require_file(job)

    @asynccontextmanager
    async def own_job(self, spec: JobSpec, *, card: ModelCard, caller: Caller) -> AsyncIterator[Job]:
        """Add a job like `add_job` that only the caller waits for, and yield it. The caller must cancel it at the end.

        It counts toward the key's limit of requests in progress while the context lasts. If the caller is cancelled
        while the job is being added, the job is cancelled. Also raises the errors of `EventStreams.counted`.
        """
        with self.streams.counted(caller):
            async with self.limiter.admitted(caller.key, audio_s=0.0, takes_place=True, metered_s=0.0):
                adding = asyncio.ensure_future(self.add_job(replace(spec, is_awaited=True), card=card, caller=caller))
                try:
                    added = await asyncio.shield(adding)
                except asyncio.CancelledError:
                    with CancelScope(shield=True):
                        await asyncio.wait({adding})
                        if adding.exception() is None:
                            await self.jobs.cancel(spec.ref)
                    raise
                yield added.job

    @staticmethod
    def require_file(job: Job) -> StoredFile:
        """Return the file of an ended job. Raises the errors of `run_job`."""
        if job.result is not None:
            return job.result.file
        if not job.is_over:
            raise process_stops()
        failed = job.error or JobError(job.state, "the generation was cancelled")
        raise _JOB_ERRORS.get(failed.code, GenerationError)(failed.message, field=failed.field)

    @contextmanager
    def _admitted(self, request: GenerationRequest) -> Iterator[None]:
        """Count a request and its decoded source audio while the block runs. Raises OverloadedError at a limit.

        Source audio above the limit is accepted if no other request in progress has source audio.
        """
        sources = (source.samples.nbytes for source in (request.init_audio, request.inpaint_audio) if source)
        num_bytes = sum(sources)
        if self._num_generating >= self.settings.ingress.max_ongoing_requests:
            message = "too many requests are in progress (ingress.max_ongoing_requests)"
            raise OverloadedError(message, retry_after_s=_BUSY_RETRY_S)
        if self._source_bytes and self._source_bytes + num_bytes > workers.MAX_SOURCE_BYTES:
            message = "too much source audio is in progress"
            raise OverloadedError(message, retry_after_s=_BUSY_RETRY_S)
        self._num_generating += 1
        self._source_bytes += num_bytes
        try:
            yield
        finally:
            self._num_generating -= 1
            self._source_bytes -= num_bytes

    async def finish(self, result: GenerationResult, order: FileOrder) -> Output:
        return await self.finish_by(result, lambda: finish(result, order))

    async def finish_by(self, result: GenerationResult, make: Callable[[], FinishedFile]) -> Output:
        """Encode the file of a result with `make`, on an encoding thread."""
        started_at = self.clock.monotonic()
        finished = await self.compute(make)
        encode_ms = (self.clock.monotonic() - started_at) * 1000
        self.metrics.observe("file_encode_ms", encode_ms)
        return Output(finished.file, finished.sample_rate_hz, finished.clips, result, encode_ms, finished.recipes)

    async def compute(self, function: Callable[[], T]) -> T:
        """Run `function` on an encoding thread and return its result."""
        return await self._audio.run_encoding(function)

    async def compute_in_turn(self, function: Callable[[], T]) -> T:
        """Like `compute`, for one call of each client at a time. So many downloads of a client do not delay clips."""
        async with self._turn("download"):
            return await self.compute(function)


def _audio_s(request: GenerationRequest) -> float:
    """Return the seconds of audio that count against the key's limit, summed over the variations."""
    return request.duration_s * request.batch_size


def _usable_s(card: ModelCard, padding_s: float | None) -> float:
    """Return how many seconds of source audio to decode: what the model can use, plus a margin for resampling."""
    return (
        card.max_duration_s + (card.default_duration_padding_s if padding_s is None else padding_s) + _SOURCE_MARGIN_S
    )


def resolve_seed(seed: int) -> int:
    """Convert a client's seed: -1 gives a random seed, and any other integer is reduced modulo 2**63."""
    return secrets.randbelow(2**32) if seed == -1 else seed % SEED_LIMIT
