"""The requests of the five systems' clients, as far as a benchmark needs them: one clip, waited for, last byte read."""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
import numpy as np
import soundfile

from benchmarks.arrivals import Arrival
from benchmarks.compare.asking import Answer, Audio, RefusedError
from benchmarks.workload import noise_audio

_TIMING = re.compile(r"(\w+);dur=([0-9.]+)")
_POLL_S = 0.1
_TIMEOUT_S = 600.0  # of one call, and of a job
_NOISE_SHARE = 0.6
_REFUSALS = (429, 503)
_CHANNELS = 2


@dataclass(frozen=True, slots=True)
class Reply:
    """A successful answer of a server."""

    content: bytes
    headers: Mapping[str, str]

    def json(self) -> Any:
        return json.loads(self.content)


class Dialect(Protocol):
    """How one system's clients ask for a clip. `model` None: the server's own choice."""

    async def fetch(self, http: aiohttp.ClientSession, arrival: Arrival, *, model: str | None) -> Reply:
        """Returns the reply whose content is the audio file."""
        ...


class OverHttp:
    """A model of a running server, asked in one of the dialects."""

    def __init__(self, http: aiohttp.ClientSession, dialect: Dialect, *, model: str | None = None) -> None:
        self._http = http
        self._dialect = dialect
        self._model = model

    async def ask(self, arrival: Arrival) -> Answer:
        reply = await self._dialect.fetch(self._http, arrival, model=self._model)
        return Answer(read_stages(reply), lambda: read_audio(reply.content))


class StableAudio3:
    """A Stable Audio 3 FastAPI server; the only dialect with variations and inpainting."""

    async def fetch(self, http: aiohttp.ClientSession, arrival: Arrival, *, model: str | None) -> Reply:
        fields: dict[str, object] = {
            "prompt": arrival.prompt,
            "duration": arrival.duration_s,
            "steps": arrival.steps,
            "cfg_scale": arrival.cfg_scale,
            "seed": arrival.seed,
        }
        if model is not None:
            fields["model"] = model
        if arrival.audio_format != "wav":
            fields["response_format"] = arrival.audio_format
        if arrival.source is None:
            return await _post(http, "/v1/audio/generations", json=fields)
        form = aiohttp.FormData({name: str(value) for name, value in fields.items()})
        form.add_field("audio", _source_file(arrival), filename=f"source.{arrival.source.container.lower()}")
        if arrival.mode == "variation":
            form.add_field("init_noise_level", str(_NOISE_SHARE))
            return await _post(http, "/v1/audio/variations", data=form)
        start_s, end_s = arrival.region_s
        form.add_field("inpaint_start_seconds", str(start_s))
        form.add_field("inpaint_end_seconds", str(end_s))
        return await _post(http, "/v1/audio/inpaint", data=form)


class StableAudioOpenSmall:
    """The Stable Audio Open Small loop API: whole seconds, its one model."""

    async def fetch(self, http: aiohttp.ClientSession, arrival: Arrival, *, model: str | None) -> Reply:
        _require_text(arrival, "saos")
        body = {
            "prompt": arrival.prompt,
            "seconds_total": _whole_seconds(arrival),
            "steps": arrival.steps,
            "cfg_scale": arrival.cfg_scale,
            "seed": arrival.seed,
            "return_format": "file",
        }
        return await _post(http, "/generate", json=body)


class VllmOmni:
    """vLLM-Omni's audio endpoint."""

    async def fetch(self, http: aiohttp.ClientSession, arrival: Arrival, *, model: str | None) -> Reply:
        _require_text(arrival, "vllm")
        body = {
            "input": arrival.prompt,
            "audio_length": arrival.duration_s,
            "num_inference_steps": arrival.steps,
            "guidance_scale": arrival.cfg_scale,
            "seed": arrival.seed,
            "response_format": arrival.audio_format,
        }
        return await _post(http, "/v1/audio/generate", json=body if model is None else body | {"model": model})


class Aiml:
    """AIML API: a job that is asked for until it is done, then its file. No seed and no guidance."""

    async def fetch(self, http: aiohttp.ClientSession, arrival: Arrival, *, model: str | None) -> Reply:
        _require_text(arrival, "aiml")
        body = {
            "model": model or "stable-audio",
            "prompt": arrival.prompt,
            "seconds_total": _whole_seconds(arrival),
            "steps": arrival.steps,
        }
        ticket = (await _post(http, "/v2/generate/audio", json=body)).json()
        async with asyncio.timeout(_TIMEOUT_S):
            while True:
                state = (await _get(http, "/v2/generate/audio", params={"generation_id": ticket["id"]})).json()
                if state["status"] not in ("queued", "generating"):
                    break
                await asyncio.sleep(_POLL_S)
        if state["status"] != "completed":
            raise RuntimeError(f"the job failed: {state}")
        return await _get(http, state["audio_file"]["url"])


class Fal:
    """fal's synchronous call, then the file it names. No seed and no guidance."""

    async def fetch(self, http: aiohttp.ClientSession, arrival: Arrival, *, model: str | None) -> Reply:
        _require_text(arrival, "fal")
        body = {"prompt": arrival.prompt, "seconds_total": _whole_seconds(arrival), "steps": arrival.steps}
        reply = await _post(http, f"/{model or 'fal-ai/stable-audio'}", json=body)
        file = await _get(http, reply.json()["audio_file"]["url"])
        return Reply(file.content, reply.headers)


DIALECTS: Mapping[str, Dialect] = {
    "sa3": StableAudio3(),
    "saos": StableAudioOpenSmall(),
    "vllm": VllmOmni(),
    "aiml": Aiml(),
    "fal": Fal(),
}


def open_session(url: str, *, key: str | None = None) -> aiohttp.ClientSession:
    """A client with as many connections as there are requests in flight and no time limit but `_TIMEOUT_S`.

    `key` is sent as a bearer token.
    """
    return aiohttp.ClientSession(
        base_url=url,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S),
        headers={"Authorization": f"Bearer {key}"} if key else {},
    )


def read_stages(reply: Reply) -> dict[str, float]:
    """Returns the milliseconds of each stage that the server tells."""
    return {name: float(ms) for name, ms in _TIMING.findall(reply.headers.get("Server-Timing", ""))}


def read_audio(content: bytes) -> Audio:
    """Returns (C, S) float32. Raises RuntimeError for what is no audio file."""
    try:
        samples, _ = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise RuntimeError(f"the server sent no audio: {content[:200]!r}") from error
    return np.ascontiguousarray(samples.T)


async def _post(http: aiohttp.ClientSession, path: str, **kwargs: Any) -> Reply:
    async with http.post(path, **kwargs) as response:
        return await _read(response)


async def _get(http: aiohttp.ClientSession, path: str, **kwargs: Any) -> Reply:
    async with http.get(path, **kwargs) as response:
        return await _read(response)


async def _read(response: aiohttp.ClientResponse) -> Reply:
    content = await response.read()
    if response.status in _REFUSALS:
        said = response.headers.get("Retry-After")
        raise RefusedError(content[:200].decode(errors="replace"), retry_after_s=float(said) if said else None)
    if response.status != 200:
        raise RuntimeError(f"{response.status} from {response.url.path}: {content[:500].decode(errors='replace')}")
    return Reply(content, response.headers)


def _require_text(arrival: Arrival, dialect: str) -> None:
    if arrival.mode != "text-to-audio":
        raise RuntimeError(f"the dialect {dialect} is asked for text to audio only; the mix has {arrival.mode}")


def _whole_seconds(arrival: Arrival) -> int:
    return max(1, round(arrival.duration_s))


def _source_file(arrival: Arrival) -> bytes:
    source = arrival.source
    if source is None:
        raise RuntimeError("an edit came without a source")
    rate_hz = source.sample_rate_hz
    audio = noise_audio(_CHANNELS, duration_s=source.duration_s, sample_rate_hz=rate_hz, seed=source.seed)
    file = io.BytesIO()
    soundfile.write(file, audio.samples.T, rate_hz, format=source.container)
    return file.getvalue()
