"""The blocking client (`Client`) and the client for asyncio (`AsyncClient`). `operations` does their work.

Each method is written twice, so that type checkers and `help` know both. `AsyncClient` gets the docstrings of `Client`.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from pathlib import Path
from typing import TypeVar, Unpack

import httpx

from stable_audio_serve.client import calls
from stable_audio_serve.client.answers import Job, JobPage, JobProgress, Model, Take
from stable_audio_serve.client.calls import Audio, Call, Connection, Recipe, Regions
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
from stable_audio_serve.client.failures import Retries
from stable_audio_serve.client.operations import TIMEOUT, AsyncNetwork, BlockingNetwork, Operations, iterate, run

T = TypeVar("T")


class Client:
    """A connection to a server. Use it with `with`, or `close` it; threads may share it.

    `base_url` defaults to the environment variable STABLE_AUDIO_URL, otherwise to http://127.0.0.1:8000. `api_key`
    defaults to STABLE_AUDIO_API_KEY. Calls that failed for a temporary reason are sent again, as `retries` defines.
    If the last attempt fails too, the method raises its error, one of `stable_audio_serve.core.errors`.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        retries: Retries | None = None,
        http: httpx.Client | None = None,
    ) -> None:
        connection = Connection.choose(base_url, api_key)
        self._http = http or httpx.Client(timeout=TIMEOUT)
        self._operations = Operations(BlockingNetwork(self._http), connection, retries=retries)
        self.jobs = Jobs(self._operations)

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
        return self.send(calls.make("generate", prompt, controls=controls))

    @takes(EditControls)
    def vary(self, audio: Audio, prompt: str, **controls: Unpack[EditControls]) -> Take:
        """Make a variation of audio. Raises OSError if its file cannot be read."""
        return self.send(calls.make("vary", prompt, controls=controls, audio=audio))

    @takes(InpaintControls)
    def inpaint(self, audio: Audio, prompt: str, *, regions: Regions, **controls: Unpack[InpaintControls]) -> Take:
        """Regenerate `regions`, [start, end) in seconds, and keep the source's samples outside. Raises OSError.

        A crossfade of 30 ms inside each region joins it to the source. With `keep="model"` the model makes the whole
        clip.
        """
        return self.send(calls.make("inpaint", prompt, controls=controls, audio=audio, regions=regions))

    @takes(InpaintControls, without=("duration",))
    def extend(
        self, audio: Audio, prompt: str, *, source_s: float, until_s: float, **controls: Unpack[InpaintControls]
    ) -> Take:
        """Extend audio of `source_s` past its end, to `until_s`, both in seconds. Raises OSError.

        The source's samples stay unchanged, except for its last 30 ms, which fade into the new audio.
        """
        fields, regions = {**controls, "duration": until_s}, [(source_s, until_s)]
        return self.send(calls.make("inpaint", prompt, controls=fields, audio=audio, regions=regions))

    @takes(LoopControls)
    def loop(self, prompt: str, *, audio: Audio | None = None, **controls: Unpack[LoopControls]) -> Take:
        """Make a loop of whole bars at the tempo that the prompt names, such as 120bpm. Raises OSError.

        With `audio` the loop is a variation of that audio in the prompt's style.
        """
        return self.send(calls.make("loop", prompt, controls=controls, audio=audio))

    def replay(self, take: Audio | Recipe, *, sources: Sequence[Audio] = ()) -> Take:
        """Recreate a take from its recipe, or from its file, which contains the recipe. Raises OSError.

        The answer's `replay` tells whether the bytes equal the original ones. `sources` are the files that the take was
        made from. If one is missing, InvalidRequestError names its SHA-256.
        """
        return self.send(calls.replay(take, sources=sources))

    def models(self) -> tuple[Model, ...]:
        """The served models."""
        return self.send(calls.models())

    def send(self, call: Call[T]) -> T:
        """Send a call, several times if need be. Returns its answer."""
        return run(self._operations.send(call))


class Jobs:
    """Work that the server does later: `client.jobs`."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    @takes(JobControls)
    def submit(self, prompt: str, *, idempotency_key: str | None = None, **controls: Unpack[JobControls]) -> Job:
        """Submit text to audio. Returns the job. A second call with the same `idempotency_key` returns the same job."""
        return self._submit(calls.submit("generate", prompt, controls=controls, key=idempotency_key))

    @takes(JobEditControls)
    def submit_variation(
        self, audio: Audio, prompt: str, *, idempotency_key: str | None = None, **controls: Unpack[JobEditControls]
    ) -> Job:
        """Submit a variation. Raises OSError."""
        return self._submit(calls.submit("vary", prompt, controls=controls, audio=audio, key=idempotency_key))

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
        return self._submit(
            calls.submit("inpaint", prompt, controls=controls, audio=audio, regions=regions, key=idempotency_key)
        )

    def get(self, job_id: str) -> Job:
        """The job as it is now."""
        return run(self._operations.send(calls.show_job(job_id)))

    def list(self, *, status: str | None = None, limit: int = 20, cursor: str | None = None) -> JobPage:
        """A page of the caller's jobs, newest first."""
        return run(self._operations.send(calls.list_jobs(status=status, limit=limit, cursor=cursor)))

    def cancel(self, job_id: str) -> Job:
        """Cancel a job: at once while it waits, within one step while it runs. Raises ConflictError if it is over."""
        return run(self._operations.cancel(job_id))

    def follow(self, job_id: str) -> Generator[JobProgress | Job]:
        """Yields the job's progress, and finally the ended job. Connects again after a lost connection."""
        return iterate(self._operations.follow(job_id))

    def wait(
        self, job_id: str, *, on_progress: Callable[[JobProgress], None] | None = None, timeout_s: float | None = None
    ) -> Job:
        """Wait for a job's end. Returns it, whether it succeeded or not. Raises DeadlineExceededError.

        `timeout_s` is checked whenever an update of the job arrives, and at least every 30 s.
        """
        return run(self._operations.wait(job_id, on_progress=on_progress, timeout_s=timeout_s))

    def download(self, job: Job | str, path: str | Path) -> Path:
        """Write a finished job's audio to a file without holding it in memory. Returns its path.

        If `path` is an existing folder, the server chooses the file name, which begins with the job's id. Raises
        GenerationError or CancelledRequestError if the job has no audio, and OSError.
        """
        return run(self._operations.download(job, Path(path)))

    def fetch(self, job: Job | str) -> Take:
        """A finished job's audio, in memory. Raises as `download`."""
        return run(self._operations.fetch(job))

    def _submit(self, call: Call[str]) -> Job:
        return run(self._operations.submit(call))


class AsyncClient:
    """A connection to a server. Use it with `async with`, or `close` it; tasks may share it.

    `base_url` defaults to the environment variable STABLE_AUDIO_URL, otherwise to http://127.0.0.1:8000. `api_key`
    defaults to STABLE_AUDIO_API_KEY. Calls that failed for a temporary reason are sent again, as `retries` defines.
    If the last attempt fails too, the method raises its error, one of `stable_audio_serve.core.errors`.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        retries: Retries | None = None,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        connection = Connection.choose(base_url, api_key)
        self._http = http or httpx.AsyncClient(timeout=TIMEOUT)
        self._operations = Operations(AsyncNetwork(self._http), connection, retries=retries)
        self.jobs = AsyncJobs(self._operations)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    @takes(Controls)
    async def generate(self, prompt: str, **controls: Unpack[Controls]) -> Take:
        return await self.send(calls.make("generate", prompt, controls=controls))

    @takes(EditControls)
    async def vary(self, audio: Audio, prompt: str, **controls: Unpack[EditControls]) -> Take:
        return await self.send(calls.make("vary", prompt, controls=controls, audio=audio))

    @takes(InpaintControls)
    async def inpaint(
        self, audio: Audio, prompt: str, *, regions: Regions, **controls: Unpack[InpaintControls]
    ) -> Take:
        return await self.send(calls.make("inpaint", prompt, controls=controls, audio=audio, regions=regions))

    @takes(InpaintControls, without=("duration",))
    async def extend(
        self, audio: Audio, prompt: str, *, source_s: float, until_s: float, **controls: Unpack[InpaintControls]
    ) -> Take:
        fields = {**controls, "duration": until_s}
        return await self.send(
            calls.make("inpaint", prompt, controls=fields, audio=audio, regions=[(source_s, until_s)])
        )

    @takes(LoopControls)
    async def loop(self, prompt: str, *, audio: Audio | None = None, **controls: Unpack[LoopControls]) -> Take:
        return await self.send(calls.make("loop", prompt, controls=controls, audio=audio))

    async def replay(self, take: Audio | Recipe, *, sources: Sequence[Audio] = ()) -> Take:
        return await self.send(calls.replay(take, sources=sources))

    async def models(self) -> tuple[Model, ...]:
        return await self.send(calls.models())

    async def send(self, call: Call[T]) -> T:
        return await self._operations.send(call)


class AsyncJobs:
    """Work that the server does later: `client.jobs`."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    @takes(JobControls)
    async def submit(self, prompt: str, *, idempotency_key: str | None = None, **controls: Unpack[JobControls]) -> Job:
        return await self._submit(calls.submit("generate", prompt, controls=controls, key=idempotency_key))

    @takes(JobEditControls)
    async def submit_variation(
        self, audio: Audio, prompt: str, *, idempotency_key: str | None = None, **controls: Unpack[JobEditControls]
    ) -> Job:
        return await self._submit(calls.submit("vary", prompt, controls=controls, audio=audio, key=idempotency_key))

    @takes(JobInpaintControls)
    async def submit_inpaint(
        self,
        audio: Audio,
        prompt: str,
        *,
        regions: Regions,
        idempotency_key: str | None = None,
        **controls: Unpack[JobInpaintControls],
    ) -> Job:
        call = calls.submit("inpaint", prompt, controls=controls, audio=audio, regions=regions, key=idempotency_key)
        return await self._submit(call)

    async def get(self, job_id: str) -> Job:
        return await self._operations.send(calls.show_job(job_id))

    async def list(self, *, status: str | None = None, limit: int = 20, cursor: str | None = None) -> JobPage:
        return await self._operations.send(calls.list_jobs(status=status, limit=limit, cursor=cursor))

    async def cancel(self, job_id: str) -> Job:
        return await self._operations.cancel(job_id)

    def follow(self, job_id: str) -> AsyncGenerator[JobProgress | Job]:
        return self._operations.follow(job_id)

    async def wait(
        self, job_id: str, *, on_progress: Callable[[JobProgress], None] | None = None, timeout_s: float | None = None
    ) -> Job:
        return await self._operations.wait(job_id, on_progress=on_progress, timeout_s=timeout_s)

    async def download(self, job: Job | str, path: str | Path) -> Path:
        return await self._operations.download(job, Path(path))

    async def fetch(self, job: Job | str) -> Take:
        return await self._operations.fetch(job)

    async def _submit(self, call: Call[str]) -> Job:
        return await self._operations.submit(call)


for _described, _twin in ((Client, AsyncClient), (Jobs, AsyncJobs)):
    for _name, _method in inspect.getmembers(_described, inspect.isfunction):
        if not _name.startswith("_"):
            getattr(_twin, _name).__doc__ = _method.__doc__
