"""The blocking client (`Client`) and the client for asyncio (`AsyncClient`). Both use the module `operations`.

Each method is written in both classes, so that type checkers and `help` show its signature. The docstrings are written
in `Client` only and copied to `AsyncClient` at the end of this module.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from pathlib import Path
from typing import TypeVar, Unpack

import httpx

from stable_audio_serve.client import calls
from stable_audio_serve.client.answers import Adapter, Job, JobPage, JobProgress, Model, Result
from stable_audio_serve.client.calls import Audio, Call, Connection, Recipe, Regions
from stable_audio_serve.client.controls import (
    EditControls,
    GenerateControls,
    InpaintControls,
    JobControls,
    JobEditControls,
    JobInpaintControls,
    LoopControls,
    accepts,
)
from stable_audio_serve.client.failures import Retries
from stable_audio_serve.client.operations import (
    AsyncNetwork,
    BlockingNetwork,
    Operations,
    iterate,
    make_http,
    run,
)

T = TypeVar("T")


class Client:
    """A connection to a server. Use it as a context manager or call `close`. Threads may share it.

    `base_url` defaults to the environment variable STABLE_AUDIO_URL, else to http://127.0.0.1:8000. `api_key` defaults
    to the variable STABLE_AUDIO_API_KEY. A request that fails for a temporary reason is sent again; `retries` sets how
    often. If the last attempt fails, the method raises an error of `stable_audio_serve.core.errors`.
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
        self._http = http or make_http(httpx.Client)
        self._operations = Operations(BlockingNetwork(self._http), connection, retries=retries)
        self.jobs = Jobs(self._operations)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    @accepts(GenerateControls)
    def generate(self, prompt: str, **controls: Unpack[GenerateControls]) -> Result:
        """Generate audio from a text prompt."""
        return self.send(calls.make("generate", prompt, controls=controls))

    @accepts(EditControls)
    def vary(self, audio: Audio, prompt: str, **controls: Unpack[EditControls]) -> Result:
        """Make a variation of audio. Raises OSError if the source file cannot be read."""
        return self.send(calls.make("vary", prompt, controls=controls, audio=audio))

    @accepts(InpaintControls)
    def inpaint(self, audio: Audio, prompt: str, *, regions: Regions, **controls: Unpack[InpaintControls]) -> Result:
        """Regenerate regions of `audio`. `regions` has the start and the end of each region in seconds.

        Samples outside the regions stay unchanged. At each end of a region, a crossfade of 30 ms inside the region
        joins new and old audio. With `keep="model"`, the samples outside the regions come from the model too. Raises
        OSError if the source file cannot be read.
        """
        return self.send(calls.make("inpaint", prompt, controls=controls, audio=audio, regions=regions))

    @accepts(InpaintControls, without=("duration",))
    def extend(
        self, audio: Audio, prompt: str, *, regions: Regions | None = None, **controls: Unpack[InpaintControls]
    ) -> Result:
        """Extend audio by `extend_before_s` before its start and by `extend_after_s` after its end.

        The source's samples stay unchanged, except for 30 ms at an extended end, which fade into the new audio.
        `regions` of the source are regenerated, as in `inpaint`. Their times count from the start of the source. Raises
        OSError if the source file cannot be read.
        """
        return self.send(calls.make("inpaint", prompt, controls=controls, audio=audio, regions=regions))

    @accepts(LoopControls)
    def loop(self, prompt: str, *, audio: Audio | None = None, **controls: Unpack[LoopControls]) -> Result:
        """Make a loop of whole bars. The prompt must name the tempo, for example 120bpm.

        With `audio`, the loop is a variation of that audio in the style of the prompt. Raises OSError if the source
        file cannot be read.
        """
        return self.send(calls.make("loop", prompt, controls=controls, audio=audio))

    def replay(self, recipe: Audio | Recipe, *, sources: Audio | Sequence[Audio] = ()) -> Result:
        """Recreate a clip from its recipe, or from its audio file if the file contains the recipe.

        `sources` is the source file that the clip was made from, or a list of several. If one is missing, the method
        raises InvalidRequestError with the SHA-256 of the missing file. The result's `replay` is "exact" if the bytes
        equal the original. A long piece is recreated by a job, and the method waits until the job ends. Raises OSError
        if a file cannot be read.
        """
        return run(self._operations.replay(calls.replay(recipe, sources=sources)))

    def models(self) -> tuple[Model, ...]:
        """List the served models."""
        return self.send(calls.models())

    def list_loras(self) -> tuple[Adapter, ...]:
        """List the adapters of the served models."""
        return self.send(calls.list_loras())

    def load_lora(self, name: str, path: str, *, model: str | None = None) -> None:
        """Add an adapter to a model of the running server. Needs a key with the scope admin.

        `path` is the absolute path of a file on the server, an https or S3 URL, or a repository of the hub. Without
        `model`, the default model gets the adapter. The adapter stays loaded until `unload_lora`, even if the server
        restarts. Raises InvalidRequestError if the file cannot be used, or if the model has another adapter of this
        name.
        """
        self.send(calls.load_lora(name, path, model=model))

    def unload_lora(self, name: str, *, model: str | None = None) -> None:
        """Remove an adapter that `load_lora` added. Needs a key with the scope admin.

        Without `model`, the adapter is removed from all models that have it. Requests that already run finish with the
        adapter. Raises NotFoundError if there is no such adapter. Raises ConflictError if the adapter comes from the
        server's configuration or from an adapter folder.
        """
        run(self._operations.unload_lora(calls.unload_lora(name, model=model)))

    def send(self, call: Call[T]) -> T:
        """Send a call, and send it again after temporary failures. Returns the parsed response."""
        return run(self._operations.send(call))


class Jobs:
    """Operations on jobs, available as `client.jobs`. A job runs on the server after its submission was answered."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    @accepts(JobControls)
    def submit(self, prompt: str, *, idempotency_key: str | None = None, **controls: Unpack[JobControls]) -> Job:
        """Submit a job that generates audio from a text prompt. With `sections`, the audio is a long piece.

        A second submission with the same `idempotency_key` returns the first job.
        """
        call = calls.submit("generate", prompt, controls=controls, key=idempotency_key)
        return run(self._operations.submit(call))

    @accepts(JobEditControls)
    def submit_variation(
        self, audio: Audio, prompt: str, *, idempotency_key: str | None = None, **controls: Unpack[JobEditControls]
    ) -> Job:
        """Submit a job that makes a variation. Raises OSError if the source file cannot be read."""
        call = calls.submit("vary", prompt, controls=controls, audio=audio, key=idempotency_key)
        return run(self._operations.submit(call))

    @accepts(JobInpaintControls)
    def submit_inpaint(
        self,
        audio: Audio,
        prompt: str,
        *,
        regions: Regions | None = None,
        idempotency_key: str | None = None,
        **controls: Unpack[JobInpaintControls],
    ) -> Job:
        """Submit a job that regenerates regions of `audio`, or extends it (see `Client.inpaint` and `Client.extend`).

        `regions` has the start and end of each region in seconds. Raises OSError if the source file cannot be read.
        """
        call = calls.submit("inpaint", prompt, controls=controls, audio=audio, regions=regions, key=idempotency_key)
        return run(self._operations.submit(call))

    def get(self, job_id: str) -> Job:
        """Get the current state of a job."""
        return run(self._operations.send(calls.show_job(job_id)))

    def list(self, *, status: str | None = None, limit: int = 20, cursor: str | None = None) -> JobPage:
        """Get a page of the caller's jobs, newest first."""
        return run(self._operations.send(calls.list_jobs(status=status, limit=limit, cursor=cursor)))

    def cancel(self, job_id: str) -> Job:
        """Cancel a job. A queued job ends at once, a running job within one denoising step.

        Returns the job. Raises ConflictError if the job had already ended.
        """
        return run(self._operations.cancel(job_id))

    def follow(self, job_id: str) -> Generator[JobProgress | Job]:
        """Yield the job's progress until the job ends, then the ended job. Reconnects if the connection is lost."""
        return iterate(self._operations.follow(job_id))

    def wait(
        self, job_id: str, *, on_progress: Callable[[JobProgress], None] | None = None, timeout_s: float | None = None
    ) -> Job:
        """Wait until a job ends, and return it. A failed job is returned too, without an error.

        Raises DeadlineExceededError if the job does not end within `timeout_s`. The time is checked once a second.
        """
        return run(self._operations.wait(job_id, on_progress=on_progress, timeout_s=timeout_s))

    def download(self, job: Job | str, path: str | Path) -> Path:
        """Download a finished job's audio to a file, without holding it in memory. Returns the file's path.

        If `path` is an existing folder, the server chooses the file name, which begins with the job's id. Raises
        GenerationError if the job failed, CancelledRequestError if it was cancelled, ConflictError if it has not ended
        yet, and OSError if the file cannot be written.
        """
        return run(self._operations.download(job, Path(path)))

    def fetch(self, job: Job | str) -> Result:
        """Download a finished job's audio and return it. Raises the same errors as `download`, except OSError."""
        return run(self._operations.fetch(job))

    def audio_chunks(self, job_id: str) -> Generator[bytes]:
        """Yield the audio file of a long piece while it is made: first the finished sections, then each new section.

        The file is MP3 if that is the job's format, otherwise WAV of unknown length. It ends early if the job fails or
        is cancelled. If the connection is lost, the client connects again and continues after the last received byte.
        """
        return iterate(self._operations.audio_chunks(job_id))

    def section(self, job_id: str, number: int) -> bytes:
        """Download one finished section of a long piece. `number` counts from 1. Joined, the sections are the piece.

        Raises NotFoundError while the section is not finished.
        """
        return run(self._operations.send(calls.section(job_id, number)))


class AsyncClient:
    """`Client` for asyncio. Use it as an async context manager or call `close`. Tasks may share it."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        retries: Retries | None = None,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        connection = Connection.choose(base_url, api_key)
        self._http = http or make_http(httpx.AsyncClient)
        self._operations = Operations(AsyncNetwork(self._http), connection, retries=retries)
        self.jobs = AsyncJobs(self._operations)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    @accepts(GenerateControls)
    async def generate(self, prompt: str, **controls: Unpack[GenerateControls]) -> Result:
        return await self.send(calls.make("generate", prompt, controls=controls))

    @accepts(EditControls)
    async def vary(self, audio: Audio, prompt: str, **controls: Unpack[EditControls]) -> Result:
        return await self.send(calls.make("vary", prompt, controls=controls, audio=audio))

    @accepts(InpaintControls)
    async def inpaint(
        self, audio: Audio, prompt: str, *, regions: Regions, **controls: Unpack[InpaintControls]
    ) -> Result:
        return await self.send(calls.make("inpaint", prompt, controls=controls, audio=audio, regions=regions))

    @accepts(InpaintControls, without=("duration",))
    async def extend(
        self, audio: Audio, prompt: str, *, regions: Regions | None = None, **controls: Unpack[InpaintControls]
    ) -> Result:
        return await self.send(calls.make("inpaint", prompt, controls=controls, audio=audio, regions=regions))

    @accepts(LoopControls)
    async def loop(self, prompt: str, *, audio: Audio | None = None, **controls: Unpack[LoopControls]) -> Result:
        return await self.send(calls.make("loop", prompt, controls=controls, audio=audio))

    async def replay(self, recipe: Audio | Recipe, *, sources: Audio | Sequence[Audio] = ()) -> Result:
        return await self._operations.replay(calls.replay(recipe, sources=sources))

    async def models(self) -> tuple[Model, ...]:
        return await self.send(calls.models())

    async def list_loras(self) -> tuple[Adapter, ...]:
        return await self.send(calls.list_loras())

    async def load_lora(self, name: str, path: str, *, model: str | None = None) -> None:
        await self.send(calls.load_lora(name, path, model=model))

    async def unload_lora(self, name: str, *, model: str | None = None) -> None:
        await self._operations.unload_lora(calls.unload_lora(name, model=model))

    async def send(self, call: Call[T]) -> T:
        return await self._operations.send(call)


class AsyncJobs:
    """Operations on jobs, available as `client.jobs`. A job runs on the server after its submission was answered."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    @accepts(JobControls)
    async def submit(self, prompt: str, *, idempotency_key: str | None = None, **controls: Unpack[JobControls]) -> Job:
        call = calls.submit("generate", prompt, controls=controls, key=idempotency_key)
        return await self._operations.submit(call)

    @accepts(JobEditControls)
    async def submit_variation(
        self, audio: Audio, prompt: str, *, idempotency_key: str | None = None, **controls: Unpack[JobEditControls]
    ) -> Job:
        call = calls.submit("vary", prompt, controls=controls, audio=audio, key=idempotency_key)
        return await self._operations.submit(call)

    @accepts(JobInpaintControls)
    async def submit_inpaint(
        self,
        audio: Audio,
        prompt: str,
        *,
        regions: Regions | None = None,
        idempotency_key: str | None = None,
        **controls: Unpack[JobInpaintControls],
    ) -> Job:
        call = calls.submit("inpaint", prompt, controls=controls, audio=audio, regions=regions, key=idempotency_key)
        return await self._operations.submit(call)

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

    async def fetch(self, job: Job | str) -> Result:
        return await self._operations.fetch(job)

    def audio_chunks(self, job_id: str) -> AsyncGenerator[bytes]:
        return self._operations.audio_chunks(job_id)

    async def section(self, job_id: str, number: int) -> bytes:
        return await self._operations.send(calls.section(job_id, number))


for _blocking, _asyncio in ((Client, AsyncClient), (Jobs, AsyncJobs)):
    for _name, _method in inspect.getmembers(_blocking, inspect.isfunction):
        if not _name.startswith("_"):
            getattr(_asyncio, _name).__doc__ = _method.__doc__
