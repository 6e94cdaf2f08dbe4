"""Success responses of the dialect: a WAV file, or JSON with the file in base64 and its metadata."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from stable_audio_serve.api.answers import attachment, encoded_answer, result_headers
from stable_audio_serve.api.middleware.observe import note
from stable_audio_serve.api.service import Output, Service
from stable_audio_serve.audio.finish import ClipOrigin, finish_window
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult


@dataclass(frozen=True, slots=True)
class Clip:
    """A finished file. The model generated `available_s` seconds of audio, and the file has the first `num_samples`.

    `generation_s` is the time that the generation took, in seconds.
    """

    output: Output
    num_samples: int
    available_s: float
    generation_s: float

    @property
    def result(self) -> GenerationResult:
        return self.output.result


async def make_clip(
    service: Service,
    request: Request,
    *,
    card: ModelCard,
    generation: GenerationRequest,
    started_at: float,
    num_samples: int | None = None,
) -> Clip:
    """Run a generation and return its first `num_samples` samples, scaled so that the peak is at full scale.

    `started_at` is the time when the HTTP request arrived.
    """
    card, generation = service.adapted(card, generation)
    note(request.scope, model=card.name, duration_s=generation.duration_s, batch_size=1)
    asked_at = service.clock.monotonic()
    result = await service.generate(card, generation, caller=request.state.caller, started_at=started_at)
    made_at = service.clock.monotonic()
    origin = ClipOrigin.of(generation) if service.settings.dialects.recipes else None
    output = await service.finish_by(result, lambda: finish_window(result, num_samples=num_samples, origin=origin))
    note(request.scope, num_bytes=output.file.num_bytes)
    num_available = result.audio[0].shape[1]
    kept, available_s = min(num_samples or num_available, num_available), num_available / result.sample_rate_hz
    return Clip(output, kept, available_s, made_at - asked_at)


async def answer(
    service: Service, output: Output, *, return_format: str, name: str, metadata: dict[str, Any]
) -> Response:
    """Return the file if `return_format` is `file`, otherwise JSON with the file in base64 and `metadata`."""
    if return_format == "file":
        return encoded_answer(output.file, attachment(name) | result_headers(output))
    return await base64_answer(service, output, metadata=metadata)


async def base64_answer(service: Service, output: Output, *, metadata: dict[str, Any]) -> Response:
    """Return JSON with the file in base64 and its metadata."""
    body = await service.compute(lambda: _pack(output, metadata))
    return Response(body, headers=result_headers(output), media_type="application/json")


def clip_metadata(
    generation: GenerationRequest, result: GenerationResult, *, duration_s: float, generation_s: float
) -> dict[str, Any]:
    """Return the metadata that `/generate` returns with a clip, except the tempo."""
    return {
        "prompt": generation.prompt,
        "negative_prompt": generation.negative_prompt,
        "steps": generation.steps,
        "cfg_scale": generation.cfg_scale,
        "seed": result.seeds[0],
        "sample_rate": result.sample_rate_hz,
        "duration_seconds": duration_s,
        "generation_time": round(generation_s, 2),
        "realtime_factor": round(duration_s / max(generation_s, 1e-6), 2),
        "device": result.device.kind,
        **_memory(result),
    }


def _memory(result: GenerationResult) -> dict[str, float]:
    used, peak = result.device.memory_used_bytes, result.device.memory_peak_bytes
    if used is None or peak is None:
        return {}
    return {"gpu_memory_used": round(used / 1e9, 2), "gpu_memory_peak": round(peak / 1e9, 2)}


def _pack(output: Output, metadata: dict[str, Any]) -> bytes:
    audio = base64.b64encode(output.file.to_bytes()).decode()
    return json.dumps({"success": True, "audio_base64": audio, "metadata": metadata}).encode()
