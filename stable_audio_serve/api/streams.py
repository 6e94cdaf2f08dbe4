"""Stream a job's progress as server-sent events, and the sections of a long piece as they are finished.

Each stream polls the job database until the job ends, because the job may run in any process. The number of streams per
process is limited.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import structlog
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from stable_audio_serve.api.middleware.callers import Caller
from stable_audio_serve.api.middleware.draining import Draining
from stable_audio_serve.core.errors import OverloadedError, QuotaError, StoppingError, StorageError
from stable_audio_serve.core.metrics import Level, Metrics
from stable_audio_serve.jobs.job import FinishedSection, Job, JobEvent
from stable_audio_serve.jobs.queue import JobQueue

T = TypeVar("T")

log = structlog.get_logger("stable_audio_serve.api")

_BUSY_RETRY_S = 10.0
_RECONNECT_MS = 2000  # clients reconnect after this time; by then a rolling update has replaced this process


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLimits:
    """Limits and poll intervals of the event streams of one process."""

    max_open: int = 128
    max_open_per_client: int = 16  # a client is identified by its API key, or without keys by its address
    first_poll_s: float = 0.5  # poll interval after a change; grows to `last_poll_s` while nothing changes
    last_poll_s: float = 2.0
    section_poll_s: float = 0.4  # poll interval for the next section of a long piece
    comment_s: float = 10.0  # interval of comments, because proxies drop silent connections after 15 s or more
    max_away_s: float = 60.0  # how long to retry, once every `last_poll_s`, while the database is unavailable


@dataclass(frozen=True, slots=True)
class Change:
    """A job after a change, and its new events. `position` is the number of jobs before it in the queue, if known."""

    job: Job
    events: tuple[JobEvent, ...]
    position: int | None


def process_stops() -> StoppingError:
    """Return the error of a request that waits for a job when this process stops."""
    return StoppingError("the server process stops; ask again", retry_after_s=_RECONNECT_MS / 1000)


async def _end_quietly(events: AsyncIterator[ServerSentEvent], draining: Draining) -> AsyncIterator[ServerSentEvent]:
    """Yield `events`, and end without an error if the database fails. The client reconnects and then gets the error."""
    try:
        async for event in events:
            yield event
    except StorageError as error:
        log.warning("event stream ended early", reason=error.message)
    if draining.is_leaving:
        yield ServerSentEvent(retry=_RECONNECT_MS, sep="\n")


class EventStreams:
    """The open event streams of one process."""

    def __init__(self, draining: Draining, *, metrics: Metrics, limits: StreamLimits | None = None) -> None:
        self._draining = draining
        self._open = Level(metrics, "event_streams_open")
        self._open_by_client: Counter[str] = Counter()
        self._limits = limits or StreamLimits()

    async def follow(
        self, jobs: JobQueue, job: Job, *, after: int = 0, finishes: bool = False
    ) -> AsyncIterator[Change]:
        """Yield the current state of a job, then every change until the job ends or is deleted.

        Changes include the events with ids above `after`. The iterator ends early when this process stops or drains,
        but with `finishes`, only if the job neither runs nor can start then. Raises StorageError if the job database is
        unavailable for more than a minute, and with `finishes`, if the job has no finished section and cannot start,
        because the stores refuse files.
        """
        current: Job | None = job
        sent: object = None
        wait_s = self._limits.first_poll_s
        while current is not None:
            is_queued = current.state == "queued"
            position = await self._ask(partial(jobs.position, current)) if is_queued else current.engine_position
            now = (current.state, current.attempts, current.stage, current.fraction, current.cancel_requested, position)
            if now != sent:
                sent, wait_s = now, self._limits.first_poll_s
                events = await self._ask(partial(jobs.events, job.spec.ref, after=after))
                after = max((event.id for event in events), default=after)
                yield Change(current, events, position)
            if current.is_over or self._must_end(current, finishes=finishes):
                return
            if finishes:
                await _require_start(jobs, current)
            await self._pause(wait_s)
            wait_s = min(wait_s * 1.5, self._limits.last_poll_s)
            current = await self._ask(partial(jobs.get, job.spec.ref))

    async def follow_sections(
        self, jobs: JobQueue, job: Job, *, finishes: bool = False
    ) -> AsyncGenerator[FinishedSection]:
        """Yield the finished sections of a long piece, then each further one when it is finished, until the job ends.

        Raises StoppingError if this process stops or drains before the job ends, and StorageError like `follow`, whose
        `finishes` it has too.
        """
        number, ref = 0, job.spec.ref
        while True:
            current = await self._ask(partial(jobs.get, ref))  # read first, to miss no section at the end
            for section in await self._ask(partial(jobs.sections, ref, after=number)):
                number = section.number
                yield section
            if current is None or current.is_over:
                return
            if self._must_end(current, finishes=finishes):
                raise process_stops()
            if finishes:
                await _require_start(jobs, current)
            await self._pause(self._limits.section_poll_s)

    def _must_end(self, job: Job, *, finishes: bool) -> bool:
        if not self._draining.is_leaving:
            return False
        # If only this process is replaced, the next runner starts the job. A stopped or drained server starts no job.
        can_start = job.spec.is_awaited and self._draining.refusal is None
        return not (finishes and (job.state == "running" or can_start))

    async def _pause(self, duration_s: float) -> None:
        if self._draining.is_leaving:
            await asyncio.sleep(duration_s)
        else:
            await self._draining.pause(duration_s)

    async def _ask(self, question: Callable[[], Awaitable[T]]) -> T:
        clock = asyncio.get_running_loop().time
        give_up_at = clock() + self._limits.max_away_s
        while clock() < give_up_at:
            with suppress(StorageError):
                return await question()
            await asyncio.sleep(self._limits.last_poll_s)
        return await question()

    def open(
        self, events: AsyncIterator[ServerSentEvent], *, caller: Caller, headers: Mapping[str, str] | None = None
    ) -> Response:
        """Return a response that sends `events`.

        Raises OverloadedError if too many streams are open, and QuotaError if this caller has too many.
        """
        self._require_room(caller)
        events = _end_quietly(events, self._draining)
        response = _EventStream(events, ping=self._limits.comment_s, sep="\n", headers=headers)
        response.counted = partial(self._counted, caller.name)
        return response

    def open_audio(
        self, chunks: AsyncIterator[bytes], *, caller: Caller, headers: Mapping[str, str], media_type: str
    ) -> Response:
        """Return a response that sends `chunks` of audio while it is made. Raises the errors of `open`."""
        self._require_room(caller)
        response = _AudioStream(chunks, headers=headers, media_type=media_type)
        response.counted = partial(self._counted, caller.name)
        return response

    @contextmanager
    def counted(self, caller: Caller) -> Iterator[None]:
        """Count a request as an open stream while the block runs and waits for a job. Raises the errors of `open`."""
        self._require_room(caller)
        with self._counted(caller.name):
            yield

    def _require_room(self, caller: Caller) -> None:
        if self._open_by_client[caller.name] >= self._limits.max_open_per_client:
            message = "this client has too many open streams"
            raise QuotaError(message, retry_after_s=_BUSY_RETRY_S)
        if self._open.value >= self._limits.max_open:
            message = "too many streams are open"
            raise OverloadedError(message, retry_after_s=_BUSY_RETRY_S)

    @contextmanager
    def _counted(self, client: str) -> Iterator[None]:
        self._open.change(1)
        self._open_by_client[client] += 1
        try:
            yield
        finally:
            self._open.change(-1)
            self._open_by_client[client] -= 1
            self._open_by_client += Counter()  # removes the entries of clients without open streams


async def _require_start(jobs: JobQueue, job: Job) -> None:
    """Raise StorageError if a job without finished sections cannot start, because the stores refuse files.

    A job with finished sections waits until the stores accept files, because its sections would be lost.
    """
    if job.state == "queued" and not job.num_sections and (health := await jobs.watch.health()).state != "ok":
        raise StorageError(f"the job cannot start: {health.reason}")


class _Counted(Response):
    """A response that counts as an open stream only while it is being sent."""

    counted: Callable[[], AbstractContextManager[None]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: PLR0917 - ASGI's signature
        with self.counted():
            await super().__call__(scope, receive, send)


class _EventStream(_Counted, EventSourceResponse): ...


class _AudioStream(_Counted, StreamingResponse): ...
