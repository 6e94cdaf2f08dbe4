"""Operations that need several requests: retries, following a job, downloads.

The blocking client and the asyncio client share this code. The operations are coroutines that send requests through a
network object. `AsyncNetwork` awaits. `BlockingNetwork` blocks and never suspends the coroutine, so `run` and `iterate`
can run the coroutine without an event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Generator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import httpx_sse

from stable_audio_serve.client import answers, calls
from stable_audio_serve.client.answers import Job, JobProgress, Result
from stable_audio_serve.client.calls import Call, Connection
from stable_audio_serve.client.failures import LOST, TEMPORARY, Attempts, Retries, read_failure, read_lost_connection
from stable_audio_serve.core.errors import ConflictError, DeadlineExceededError, NotFoundError, StableAudioError

T = TypeVar("T")
H = TypeVar("H", httpx.Client, httpx.AsyncClient)

# The response to a generation arrives only when the audio is complete, so the client waits long. On the server, the
# request's deadline limits the time.
_ANSWER_S, _CONNECT_S = 600.0, 10.0
TIMEOUT = httpx.Timeout(_ANSWER_S, connect=_CONNECT_S)
# Options of an `httpx.Client`: no proxy for addresses of this machine, even if environment variables name a proxy. The
# proxy would look for the server on its own machine.
DIRECT: dict[str, Any] = {"mounts": dict.fromkeys(("all://127.0.0.1", "all://localhost", "all://[::1]"))}
# The server sends a comment on the event stream every ten seconds, so 30 s without data mean a lost connection.
_STREAM_TIMEOUT = httpx.Timeout(30.0, connect=_CONNECT_S)
_POLL_S = 1.0
# After this many event streams in a row without an event, assume that a proxy buffers the events, and poll instead.
_MOST_BROKEN = 3


def make_http(kind: type[H], **options: Any) -> H:
    """Return a client of httpx. `options` are further arguments of its class `kind`.

    Raises ValueError or OSError if it cannot use the proxy or the certificates that environment variables name.
    """
    try:
        return kind(**{"timeout": TIMEOUT, **DIRECT, **options})
    except OSError as error:
        error.filename = "SSL_CERT_FILE"  # otherwise the error names no file
        raise
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise ValueError(f"the proxy set in the environment: {error}") from error


class BlockingNetwork:
    """Sends requests, reads responses and sleeps for `Client`. Every method blocks until it has finished."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    async def request(self, **arguments: Any) -> httpx.Response:
        return self._http.request(**arguments)

    @asynccontextmanager
    async def stream(self, **arguments: Any) -> AsyncIterator[httpx.Response]:
        with self._http.stream(**arguments) as response:
            yield response

    async def read(self, response: httpx.Response) -> bytes:
        return response.read()

    async def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        for chunk in response.iter_bytes():
            yield chunk

    async def events(self, response: httpx.Response) -> AsyncGenerator[httpx_sse.ServerSentEvent]:
        for event in httpx_sse.EventSource(response).iter_sse():
            yield event

    async def sleep(self, delay_s: float) -> None:
        time.sleep(delay_s)  # noqa: ASYNC251


class AsyncNetwork:
    """Sends requests, reads responses and sleeps for `AsyncClient`, with asyncio."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def request(self, **arguments: Any) -> httpx.Response:
        return await self._http.request(**arguments)

    def stream(self, **arguments: Any) -> AbstractAsyncContextManager[httpx.Response]:
        return self._http.stream(**arguments)

    async def read(self, response: httpx.Response) -> bytes:
        return await response.aread()

    def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        return response.aiter_bytes()

    def events(self, response: httpx.Response) -> AsyncGenerator[httpx_sse.ServerSentEvent]:
        return httpx_sse.EventSource(response).aiter_sse()

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that uses a `BlockingNetwork` and return its result."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise RuntimeError("a coroutine over a blocking network was suspended")


def iterate(items: AsyncGenerator[T]) -> Generator[T]:
    """Yield the items of an async generator that uses a `BlockingNetwork`. Closes the generator at the end."""
    try:
        while True:
            yield run(items.__anext__())
    except StopAsyncIteration:
        return
    finally:
        run(items.aclose())


class Operations:
    """Carries out the clients' operations on one server."""

    def __init__(
        self, network: BlockingNetwork | AsyncNetwork, connection: Connection, *, retries: Retries | None
    ) -> None:
        self._network = network
        self._connection = connection
        self._retries = retries or Retries()

    async def send(self, call: Call[T], attempts: Attempts | None = None) -> T:
        """Send a call, and send it again after temporary failures. Returns the parsed response."""

        async def act() -> T:
            response = await self._network.request(**self._connection.request(call))
            if not response.is_success:
                raise read_failure(response)
            with answers.parsing("the server's answer"):
                return call.read(response)

        return await self._retry(act, attempts or Attempts(self._retries))

    async def submit(self, call: Call[str]) -> Job:
        return await self.send(calls.show_job(await self.send(call)))

    async def replay(self, call: Call[Result | str]) -> Result:
        """Recreate a clip. If the server recreates it with a job, wait for the job. Raises the errors of `fetch`."""
        made = await self.send(call)
        if isinstance(made, Result):
            return made
        job = await self.wait(made, on_progress=None, timeout_s=None)
        return replace(await self.fetch(job), replay=job.sent.get("replay"))

    async def audio_chunks(self, job_id: str) -> AsyncGenerator[bytes]:
        """Yield the audio file of a long piece while it is made.

        If the stream breaks, opens it again. The new stream begins with bytes that were yielded before. They are
        skipped.
        """
        num_yielded, attempts = 0, Attempts(self._retries)
        while True:
            position = 0
            try:
                async with self._open(job_id, "audio", params={"follow": "1"}) as response:
                    async for chunk in self._network.chunks(response):
                        new, position = chunk[max(num_yielded - position, 0) :], position + len(chunk)
                        if new:
                            num_yielded, attempts = position, Attempts(self._retries)
                            yield new
                return
            except LOST as error:
                failure: StableAudioError = read_lost_connection(error)
            except StableAudioError as error:
                failure = error
            await self._network.sleep(attempts.pause_s(failure))

    async def cancel(self, job_id: str) -> Job:
        """Cancel a job and return it. Raises ConflictError if the job had already ended.

        If the response to the first attempt is lost, the job may already be cancelled at the second attempt. This is
        not an error.
        """
        attempts = Attempts(self._retries)
        try:
            return await self.send(calls.cancel_job(job_id), attempts)
        except ConflictError:
            if not attempts.has_retried:
                raise
            job = await self.send(calls.show_job(job_id))
            if job.status != "cancelled":
                raise
            return job

    async def unload_lora(self, call: Call[None]) -> None:
        """Remove an adapter. If the response to the first attempt is lost, NotFoundError at the second is no error."""
        attempts = Attempts(self._retries)
        try:
            await self.send(call, attempts)
        except NotFoundError:
            if not attempts.has_retried:
                raise

    async def follow(self, job_id: str) -> AsyncGenerator[JobProgress | Job]:
        """Yield the job's progress until the job ends, then the ended job.

        Reads the job's event stream. If several streams in a row have no event, polls the job's status instead.
        """
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        num_broken, pause_s = 0, 0.5
        while num_broken < _MOST_BROKEN:
            num_broken += 1
            stream = self._open(job_id, "events", headers=headers, timeout=_STREAM_TIMEOUT)
            with suppress(*LOST, httpx_sse.SSEError, *TEMPORARY):
                async with stream as response, aclosing(self._network.events(response)) as events:
                    if response.status_code == httpx.codes.NO_CONTENT:  # there are no more events
                        break
                    async for event in events:
                        num_broken = 0
                        pause_s = pause_s if event.retry is None else event.retry / 1000.0
                        if event.id:
                            headers["Last-Event-ID"] = event.id
                        update = answers.read_event(event)
                        if update is not None:
                            yield update
                        if isinstance(update, Job):
                            return
            await self._network.sleep(pause_s)
        async with aclosing(self._poll(job_id)) as polling:
            async for update in polling:
                yield update

    async def _poll(self, job_id: str, *, ends_at: float | None = None) -> AsyncGenerator[JobProgress | Job]:
        call, attempts = calls.show_job(job_id), None
        while True:
            if ends_at is not None:  # then neither a silent server nor the retries may use more time than is left
                left_s = max(ends_at - time.monotonic(), _POLL_S)
                timeout = httpx.Timeout(min(left_s, _ANSWER_S), connect=min(left_s, _CONNECT_S))
                call = replace(call, options={"timeout": timeout})
                attempts = Attempts(replace(self._retries, most_wait_s=min(self._retries.most_wait_s, left_s)))
            job = await self.send(call, attempts)
            if job.is_over:
                yield job
                return
            yield job.progress
            await self._network.sleep(_POLL_S)

    async def wait(
        self, job_id: str, *, on_progress: Callable[[JobProgress], None] | None, timeout_s: float | None
    ) -> Job:
        ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        # An event stream is silent while the job's progress does not change, so the time could not be checked.
        updates = self.follow(job_id) if ends_at is None else self._poll(job_id, ends_at=ends_at)
        async with aclosing(updates) as following:
            async for update in following:
                if isinstance(update, Job):
                    return update
                if on_progress is not None:
                    on_progress(update)
                if ends_at is not None and time.monotonic() > ends_at:
                    raise DeadlineExceededError(f"the job was not over after {timeout_s:g} s")
        raise AssertionError("a job is followed to its end")

    async def download(self, job: Job | str, path: Path) -> Path:

        async def write(response: httpx.Response, _: Job) -> Path:
            place = answers.place_file(response, path)
            with answers.whole_file(place) as file:
                async for chunk in self._network.chunks(response):
                    file.write(chunk)
            return place

        return await self._with_audio(job, write)

    async def fetch(self, job: Job | str) -> Result:

        async def read(response: httpx.Response, job: Job) -> Result:
            content = await self._network.read(response)
            return answers.read_job_result(job, content, disposition=response.headers.get("content-disposition", ""))

        return await self._with_audio(job, read)

    async def _with_audio(self, job: Job | str, use: Callable[[httpx.Response, Job], Awaitable[T]]) -> T:
        """Open the download of a job's audio, call `use` with the response and the job, and return what `use` returns.

        After a temporary failure of the download or of `use`, both are repeated.
        """
        job = await self.send(calls.show_job(job)) if isinstance(job, str) else job
        answers.require_success(job)

        async def act() -> T:
            async with self._audio(job) as response:
                return await use(response, job)

        return await self._retry(act, Attempts(self._retries))

    async def _retry(self, act: Callable[[], Awaitable[T]], attempts: Attempts) -> T:
        """Return what `act` returns. Calls it again after temporary failures. Raises errors of `core.errors`."""
        while True:
            try:
                return await act()
            except LOST as error:
                failure: StableAudioError = read_lost_connection(error)
            except StableAudioError as error:
                failure = error
            await self._network.sleep(attempts.pause_s(failure))

    @asynccontextmanager
    async def _audio(self, job: Job) -> AsyncIterator[httpx.Response]:
        """Open the download of a job's audio.

        If the job has a link to an S3 bucket, downloads from the bucket. Without a link, or if the bucket's download
        cannot be opened, downloads from the server.
        """
        async with AsyncExitStack() as opened:
            response = None
            if url := job.bucket_url:
                # The bucket is on another host. Therefore this request does not contain the API key.
                with suppress(*LOST):
                    response = await opened.enter_async_context(self._network.stream(method="GET", url=url))
            if response is None or not response.is_success:
                response = await opened.enter_async_context(self._open(job.id, "audio"))
            yield response

    @asynccontextmanager
    async def _open(
        self, job_id: str, below: str, *, headers: Mapping[str, str] | None = None, **options: Any
    ) -> AsyncIterator[httpx.Response]:
        """Send GET `/jobs/{job_id}/{below}` and open the response. Raises errors of httpx and of `core.errors`."""
        url = self._connection.url(calls.job_path(job_id, below))
        headers = self._connection.headers(headers)
        async with self._network.stream(method="GET", url=url, headers=headers, **options) as response:
            if not response.is_success:
                await self._network.read(response)
                raise read_failure(response)
            yield response
