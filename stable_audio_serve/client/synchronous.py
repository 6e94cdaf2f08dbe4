"""The client for programs without an event loop. Its twin is `asynchronous`."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Unpack

import httpx
import httpx_sse

from stable_audio_serve.client import answers, calls
from stable_audio_serve.client.answers import Job, JobPage, JobProgress, Model, Take
from stable_audio_serve.client.calls import Audio, Call, Recipe, Regions
from stable_audio_serve.client.connection import STREAM_TIMEOUT, TIMEOUT, Connection
from stable_audio_serve.client.controls import (
    Controls,
    EditControls,
    InpaintControls,
    JobControls,
    JobEditControls,
    JobInpaintControls,
    LoopControls,
    takes,
)
from stable_audio_serve.client.failures import read_failure, read_lost_connection
from stable_audio_serve.client.files import whole_file
from stable_audio_serve.client.following import POLL_S, Following
from stable_audio_serve.client.retrying import Attempts, Retries
from stable_audio_serve.core.errors import ConflictError, DeadlineExceededError, OverloadedError, StableAudioError


class Client:
    """A connection to a server. Use it with `with`, or `close` it; threads may share it.

    `base_url` and `api_key` default to the environment's STABLE_AUDIO_URL and STABLE_AUDIO_API_KEY, and the server to
    http://127.0.0.1:8000. Every method raises errors of `stable_audio_serve.core.errors`: what may pass is tried again
    as `retries` says, and raised after the last attempt.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        retries: Retries | None = None,
        http: httpx.Client | None = None,
    ) -> None:
        self._connection = Connection.choose(base_url, api_key)
        self.retries = retries or Retries()
        self._http = http or httpx.Client(timeout=TIMEOUT)
        self.jobs = Jobs(self)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    @takes(Controls)
    def generate(self, prompt: str, **controls: Unpack[Controls]) -> Take:
        """Make audio from a text prompt."""
        return answers.read_take(self.send(calls.generate(prompt, controls)))

    @takes(EditControls)
    def vary(self, audio: Audio, prompt: str, **controls: Unpack[EditControls]) -> Take:
        """Make a variation of audio. Raises OSError if its file cannot be read."""
        return answers.read_take(self.send(calls.vary(audio, prompt, controls=controls)))

    @takes(InpaintControls)
    def inpaint(self, audio: Audio, prompt: str, *, regions: Regions, **controls: Unpack[InpaintControls]) -> Take:
        """Regenerate `regions`, [start, end) in seconds, and keep the source's samples outside. Raises OSError.

        Inside each region 30 ms of crossfade join the two; `keep="model"` has the model make everything.
        """
        return answers.read_take(self.send(calls.inpaint(audio, prompt, regions=regions, controls=controls)))

    @takes(InpaintControls, without=("duration",))
    def extend(
        self, audio: Audio, prompt: str, *, source_s: float, until_s: float, **controls: Unpack[InpaintControls]
    ) -> Take:
        """Continue audio that is `source_s` long until it is `until_s` long, in seconds. Raises OSError.

        All but the last 30 ms of the source, which fade into what follows, keep their samples.
        """
        controls["duration"] = until_s
        return self.inpaint(audio, prompt, regions=[(source_s, until_s)], **controls)

    @takes(LoopControls)
    def loop(self, prompt: str, *, audio: Audio | None = None, **controls: Unpack[LoopControls]) -> Take:
        """Make a loop of whole bars at the tempo that the prompt names, such as 120bpm. Raises OSError.

        With `audio` it is made in the prompt's style from that.
        """
        return answers.read_take(self.send(calls.loop(prompt, audio=audio, controls=controls)))

    def replay(self, take: Audio | Recipe, *, sources: Sequence[Audio] = ()) -> Take:
        """Make a take again from its recipe, or from its file, which carries one. `replay` of the answer says whether
        its bytes are those of the first time. Raises OSError.

        `sources` are the files that it was made from; InvalidRequestError names the SHA-256 of one that is missing.
        """
        return answers.read_take(self.send(calls.replay(take, sources=sources)))

    def models(self) -> tuple[Model, ...]:
        """The served models."""
        return answers.read_models(self.send(calls.models()).json())

    def send(self, call: Call, attempts: Attempts | None = None) -> httpx.Response:
        """Send a call, again if need be, as `attempts` count. Returns its successful answer, read."""
        attempts = attempts or Attempts(self.retries)
        while True:
            try:
                response = self._http.request(**self._connection.request(call))
                if response.is_success:
                    return response
                failure = read_failure(response)
            except httpx.TransportError as error:
                failure = read_lost_connection(error)
            time.sleep(attempts.pause_s(failure))

    def open_events(self, job_id: str, following: Following) -> AbstractContextManager[httpx_sse.EventSource]:
        """Open a job's event stream."""
        url = self._connection.url(calls.job_path(job_id, "events"))
        headers = self._connection.headers(following.headers)
        return httpx_sse.connect_sse(self._http, "GET", str(url), headers=headers, timeout=STREAM_TIMEOUT)

    @contextmanager
    def open_audio(self, job: Job) -> Iterator[httpx.Response]:
        """Open the download of a job's audio, through the server where its link leads to a bucket out of reach."""
        with ExitStack() as stack:
            response = None
            if url := job.bucket_url:
                with suppress(httpx.TransportError):
                    response = stack.enter_context(self._http.stream("GET", url))  # another host: without the key
            if response is None or not response.is_success:
                own = self._connection.url(calls.job_path(job.id, "audio"))
                response = stack.enter_context(self._http.stream("GET", own, headers=self._connection.headers()))
            yield response


class Jobs:
    """Work that the server does later: `client.jobs`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @takes(JobControls)
    def submit(self, prompt: str, *, idempotency_key: str | None = None, **controls: Unpack[JobControls]) -> Job:
        """Submit text to audio. Returns the job, which is the same one for the same `idempotency_key`."""
        return self._submit(calls.submit(prompt, controls, key=idempotency_key))

    @takes(JobEditControls)
    def submit_variation(
        self, audio: Audio, prompt: str, *, idempotency_key: str | None = None, **controls: Unpack[JobEditControls]
    ) -> Job:
        """Submit a variation. Raises OSError."""
        return self._submit(calls.submit_variation(audio, prompt, controls=controls, key=idempotency_key))

    @takes(JobInpaintControls)
    def submit_inpaint(
        self,
        audio: Audio,
        prompt: str,
        *,
        regions: Regions,
        idempotency_key: str | None = None,
        **controls: Unpack[JobInpaintControls],
    ) -> Job:
        """Submit the regeneration of `regions`, [start, end) in seconds. Raises OSError."""
        call = calls.submit_inpaint(audio, prompt, regions=regions, controls=controls, key=idempotency_key)
        return self._submit(call)

    def get(self, job_id: str) -> Job:
        """The job as it is now."""
        return answers.read_job(self._client.send(calls.show_job(job_id)).json())

    def list(self, *, status: str | None = None, limit: int = 20, cursor: str | None = None) -> JobPage:
        """A page of the caller's jobs, newest first."""
        call = calls.list_jobs(status=status, limit=limit, cursor=cursor)
        return answers.read_page(self._client.send(call).json())

    def cancel(self, job_id: str) -> Job:
        """Cancel a job: at once while it waits, within one step while it runs. Raises ConflictError if it is over."""
        attempts = Attempts(self._client.retries)
        try:
            return answers.read_job(self._client.send(calls.cancel_job(job_id), attempts).json())
        except ConflictError:
            if not attempts.are_several:
                raise
            job = self.get(job_id)
            if job.status != "cancelled":  # if it is, by an attempt whose answer was lost
                raise
            return job

    def follow(self, job_id: str) -> Generator[JobProgress | Job]:
        """Yields the job's progress, and at its end the job. Lost connections are made again."""
        following = Following()
        pause_s: float | None = 0.0
        while pause_s is not None:
            time.sleep(pause_s)
            with closing(self._stream(job_id, following)) as stream:
                for news in stream:
                    yield news
                    if isinstance(news, Job):
                        return
            pause_s = following.pause_s()
        yield from self._poll(job_id)

    def wait(
        self, job_id: str, *, on_progress: Callable[[JobProgress], None] | None = None, timeout_s: float | None = None
    ) -> Job:
        """Wait for a job's end. Returns it, whether it succeeded or not. Raises DeadlineExceededError.

        `timeout_s` is looked at whenever something is heard of the job, at least every 30 s.
        """
        ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        with closing(self.follow(job_id)) as following:
            for news in following:
                if isinstance(news, Job):
                    return news
                if on_progress is not None:
                    on_progress(news)
                if ends_at is not None and time.monotonic() > ends_at:
                    raise DeadlineExceededError(f"the job was not over after {timeout_s:g} s")
        return self.get(job_id)

    def download(self, job: Job | str, path: str | Path) -> Path:
        """Write a finished job's audio to a file without holding it in memory. Returns its path.

        In a folder that exists the file gets the name that the server gives it, which begins with the job's id. Raises
        GenerationError or CancelledRequestError for a job that has none, OSError.
        """
        job = self.get(job) if isinstance(job, str) else job
        answers.require_success(job)
        attempts = Attempts(self._client.retries)
        while True:
            try:
                with self._audio(job) as response:
                    place = answers.place_file(response, Path(path))
                    with whole_file(place) as file:
                        for chunk in response.iter_bytes():
                            file.write(chunk)
                    return place
            except StableAudioError as failure:
                time.sleep(attempts.pause_s(failure))

    def fetch(self, job: Job | str) -> Take:
        """A finished job's audio, in memory. Raises as `download`."""
        job = self.get(job) if isinstance(job, str) else job
        answers.require_success(job)
        attempts = Attempts(self._client.retries)
        while True:
            try:
                with self._audio(job) as response:
                    content = response.read()
                    return answers.read_job_take(
                        job, content, disposition=response.headers.get("content-disposition", "")
                    )
            except StableAudioError as failure:
                time.sleep(attempts.pause_s(failure))

    def _submit(self, call: Call) -> Job:
        return self.get(self._client.send(call).json()["id"])

    def _stream(self, job_id: str, following: Following) -> Generator[JobProgress | Job]:
        """Yields what one connection brings, nothing if there can be none now. Raises errors that do not pass."""
        try:
            with self._client.open_events(job_id, following) as source:
                response = source.response
                if response.status_code == 204:
                    yield self.get(job_id)
                    return
                if not response.is_success:
                    response.read()
                    raise read_failure(response)
                for event in source.iter_sse():
                    news = following.read(event)
                    if news is not None:
                        yield news
        except (httpx.TransportError, httpx_sse.SSEError, OverloadedError):
            return

    def _poll(self, job_id: str) -> Generator[JobProgress | Job]:
        while True:
            job = self.get(job_id)
            yield job if job.is_over else job.progress
            if job.is_over:
                return
            time.sleep(POLL_S)

    @contextmanager
    def _audio(self, job: Job) -> Generator[httpx.Response]:
        """Opens the download of a job's audio, whose failures are errors of this project."""
        try:
            with self._client.open_audio(job) as response:
                if not response.is_success:
                    response.read()
                    raise read_failure(response)
                yield response
        except httpx.TransportError as error:
            raise read_lost_connection(error) from error
