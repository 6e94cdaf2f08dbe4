"""Clients of the five supported APIs (dialects), for benchmarks. A client requests a clip and reads the whole file."""

from __future__ import annotations

import asyncio
import io
import itertools
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import numpy as np
import soundfile

from benchmarks.load import Answer, Audio, RefusedError
from benchmarks.workload import Arrival

Fetch = Callable[[httpx.AsyncClient, Arrival, str | None], Awaitable[httpx.Response]]

_TIMING = re.compile(r"(\w+);dur=([0-9.]+)")
_POLL_S = 0.1
_TIMEOUT_S = 600.0  # time limit of one HTTP request, and of one job
_POOLS = 8  # number of HTTP clients: a single client would slowly search through all its open connections
_REFUSALS = (429, 503)
_FIELDS = ("prompt", "duration_s", "steps", "cfg_scale", "seed")  # the fields of an Arrival that are sent


class OverHttp:
    """A client of one model of a running server, over one of the supported APIs (`dialect`)."""

    def __init__(self, clients: list[httpx.AsyncClient], dialect: str = "sa3", *, model: str | None = None) -> None:
        """If `model` is None, requests name no model, and the server uses its default."""
        self._clients = itertools.cycle(clients)
        self._fetch = DIALECTS[dialect]
        self._model = model

    async def ask(self, arrival: Arrival) -> Answer:
        try:
            response = await self._fetch(next(self._clients), arrival, self._model)
        except (httpx.HTTPError, TimeoutError) as error:
            raise RuntimeError(f"{type(error).__name__} {error}") from error
        content, timing = response.content, response.headers.get("Server-Timing", "")
        stages_ms = {name: float(ms) for name, ms in _TIMING.findall(timing)}
        return Answer(stages_ms, _count_samples(content), lambda: read_audio(content))

    async def settle(self) -> None:
        """Return at once: a remote server does not report whether it is still optimising."""


@asynccontextmanager
async def open_clients(url: str, *, key: str | None = None) -> AsyncIterator[list[httpx.AsyncClient]]:
    """Yield HTTP clients without a limit on requests in flight. `key` is sent as a bearer token."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                httpx.AsyncClient(
                    base_url=url,
                    headers={"Authorization": f"Bearer {key}"} if key else {},
                    limits=httpx.Limits(max_connections=None),
                    timeout=_TIMEOUT_S,
                    trust_env=False,
                )
            )
            for _ in range(_POOLS)
        ]


def _route(path: str, *names: str) -> Fetch:
    """Returns a function that requests a clip from a route whose response is the audio file.

    `names` are the names that the route gives to the fields in `_FIELDS`.
    """

    async def fetch(http: httpx.AsyncClient, arrival: Arrival, model: str | None) -> httpx.Response:  # noqa: PLR0917
        body = {name: getattr(arrival, field) for name, field in zip(names, _FIELDS, strict=True)}
        return await _call(http, path, json=body if model is None else body | {"model": model})

    return fetch


async def _fetch_saos(http: httpx.AsyncClient, arrival: Arrival, model: str | None) -> httpx.Response:  # noqa: PLR0917
    """Request a clip from the Stable Audio Open Small loop API. It has only whole seconds, and no choice of `model`."""
    body = _whole_seconds(arrival) | {"cfg_scale": arrival.cfg_scale, "seed": arrival.seed, "return_format": "file"}
    return await _call(http, "/generate", json=body)


async def _fetch_aiml(http: httpx.AsyncClient, arrival: Arrival, model: str | None) -> httpx.Response:  # noqa: PLR0917
    """Request a clip as in AIML API: create a job, poll it until it is done, then get its file.

    The API has no seed and no guidance scale.
    """
    path, body = "/v2/generate/audio", _whole_seconds(arrival) | {"model": model or "stable-audio"}
    ticket = (await _call(http, path, json=body)).json()
    async with asyncio.timeout(_TIMEOUT_S):
        while True:
            response = await _call(http, path, method="GET", params={"generation_id": ticket["id"]})
            state = response.json()
            if state["status"] not in ("queued", "generating"):
                break
            await asyncio.sleep(_POLL_S)
    if state["status"] != "completed":
        raise RuntimeError(f"the job failed: {state}")
    return await _call(http, state["audio_file"]["url"], method="GET")


async def _fetch_fal(http: httpx.AsyncClient, arrival: Arrival, model: str | None) -> httpx.Response:  # noqa: PLR0917
    """Request a clip from fal's synchronous route, then get the file at the URL in its response.

    The API has no seed and no guidance scale.
    """
    reply = await _call(http, f"/{model or 'fal-ai/stable-audio'}", json=_whole_seconds(arrival))
    return await _call(http, reply.json()["audio_file"]["url"], method="GET")


DIALECTS: Mapping[str, Fetch] = {
    "sa3": _route("/v1/audio/generations", "prompt", "duration", "steps", "cfg_scale", "seed"),
    "saos": _fetch_saos,
    "vllm": _route("/v1/audio/generate", "input", "audio_length", "num_inference_steps", "guidance_scale", "seed"),
    "aiml": _fetch_aiml,
    "fal": _fetch_fal,
}


def read_audio(content: bytes) -> Audio:
    """Returns the audio in a file's bytes, (channels, samples) float32. Raises RuntimeError for other content."""
    try:
        samples, _ = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise RuntimeError(f"the server sent no audio: {content[:200]!r}") from error
    return np.ascontiguousarray(samples.T)


async def _call(http: httpx.AsyncClient, path: str, *, method: str = "POST", **kwargs: Any) -> httpx.Response:
    response = await http.request(method, path, **kwargs)
    if response.status_code in _REFUSALS:
        raise RefusedError(response.text[:200], retry_after_s=_retry_after_s(response))
    if response.status_code != 200:
        raise RuntimeError(f"{response.status_code} from {path}: {response.text[:500]}")
    return response


def _retry_after_s(response: httpx.Response) -> float | None:
    """Returns the seconds in Retry-After, or None if the header is missing or has a date."""
    try:
        return float(response.headers.get("Retry-After", ""))
    except ValueError:
        return None


def _whole_seconds(arrival: Arrival) -> dict[str, object]:
    return {"prompt": arrival.prompt, "seconds_total": max(1, round(arrival.duration_s)), "steps": arrival.steps}


def _count_samples(content: bytes) -> int:
    """Returns the number of samples per channel of an audio file, even of a truncated file. 0 for other content."""
    try:
        return soundfile.info(io.BytesIO(content)).frames
    except soundfile.LibsndfileError:
        return 0
