"""Two ways to generate the clips of an evaluation: with an engine in this process, or with a server over HTTP."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np
import numpy.typing as npt

from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.engine import Engine
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.registry import BUILT_IN

Audio = npt.NDArray[np.float32]


class Player(Protocol):
    """Generates stereo audio (2, samples) float32 for requests."""

    async def play(self, request: GenerationRequest) -> Audio:
        """Returns the audio of one request."""
        ...


class EnginePlayer:
    """Generates audio with an engine that runs a checkpoint folder on the CPU. Use with `async with`."""

    def __init__(self, folder: Path, *, dtype: str | None = None) -> None:
        """`dtype` is the denoiser's precision (None: float32)."""
        self._engine = Engine(load_model(replace(BUILT_IN["demo"], folder=str(folder)), dtype=dtype))

    async def __aenter__(self) -> EnginePlayer:
        await self._engine.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._engine.close()

    async def play(self, request: GenerationRequest) -> Audio:
        """Returns the audio of one request, clipped to -1..1."""
        return (await self._engine.generate(request)).audio[0].clip(-1.0, 1.0)


class HttpPlayer:
    """Generates audio with the demo model of a running server, through its native API. Use with `async with`."""

    def __init__(self, url: str) -> None:
        self._client = httpx.AsyncClient(base_url=url, timeout=120)

    async def __aenter__(self) -> HttpPlayer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def play(self, request: GenerationRequest) -> Audio:
        """Returns the audio of one request. Raises httpx.HTTPStatusError if the server refuses the request."""
        import soundfile

        fields: dict[str, Any] = {"model": "demo", "prompt": request.prompt, "duration": request.duration_s}
        fields |= {"seed": request.seed, "steps": request.steps}
        if request.cfg_scale is not None:
            fields["cfg_scale"] = request.cfg_scale
        if request.sampler is not None:
            raise ValueError("over HTTP the server's own sampler is judged")
        if request.init_audio is not None:
            fields["init_noise_level"] = request.init_noise_level
            answer = await self._post_file("/v1/audio/variations", fields, source=request.init_audio)
        elif request.inpaint_audio is not None:
            starts, ends = zip(*request.inpaint_regions_s, strict=True)
            fields |= {"inpaint_start_seconds": str(list(starts)), "inpaint_end_seconds": str(list(ends))}
            answer = await self._post_file("/v1/audio/inpaint", fields, source=request.inpaint_audio)
        else:
            answer = await self._client.post("/v1/audio/generations", json=fields)
        answer.raise_for_status()
        samples, _ = soundfile.read(io.BytesIO(answer.content), dtype="float32", always_2d=True)
        return np.ascontiguousarray(samples.T)

    async def _post_file(self, path: str, fields: dict[str, Any], *, source: SourceAudio) -> httpx.Response:
        import soundfile

        file = io.BytesIO()
        soundfile.write(file, source.samples.T, source.sample_rate_hz, format="WAV", subtype="FLOAT")
        return await self._client.post(path, data=fields, files={"audio": ("source.wav", file.getvalue())})
