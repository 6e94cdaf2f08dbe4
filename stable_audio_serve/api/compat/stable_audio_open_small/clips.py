"""Clips from a text prompt or an upload, and responses: a WAV file, or JSON with the file in base64 and metadata."""

from __future__ import annotations

import base64
import json
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response

from stable_audio_serve.api.answers import attachment, encoded_answer, result_headers
from stable_audio_serve.api.compat.stable_audio_open_small.schemas import GenerateBody, StyleForm
from stable_audio_serve.api.compat.stable_audio_open_small.windowed_model import (
    WindowedModel,
    default_model,
    find_model,
)
from stable_audio_serve.api.middleware.observe import note
from stable_audio_serve.api.service import Output, Service, resolve_seed
from stable_audio_serve.audio.finish import ClipOrigin, finish_window
from stable_audio_serve.audio.loops import read_tempo
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, SourceAudio


async def make_text_clip(service: Service, request: Request, *, body: GenerateBody) -> Response:
    """Handle `POST /generate`."""
    started_at = service.clock.monotonic()
    model = find_model(service, body)
    wanted_s = model.window_s if body.seconds_total is None else min(body.seconds_total, model.window_s)
    generation = GenerationRequest(
        prompt=body.prompt,
        duration_s=model.window_s if model.makes_window else wanted_s,
        conditioned_total_s=model.conditioned_s,
        seed=resolve_seed(body.seed),
        start_s=(body.seconds_start or 0.0) if model.card.conditions_on_start else 0.0,
        negative_prompt=body.negative_prompt,
        steps=model.steps(body.steps, at_most=250),
        cfg_scale=body.cfg_scale,
        sampler=model.sampler(body.sampler_type),
        request_id=request.state.request_id,
    )
    num_samples = max(int(wanted_s * model.card.sample_rate_hz), 1)
    output = await make_clip(
        service, request, card=model.card, generation=generation, started_at=started_at, num_samples=num_samples
    )
    duration_s = round(min(num_samples / model.card.sample_rate_hz, length_s(output.result)), 2)
    return await answer(
        service,
        output,
        return_format=body.return_format,
        name=f"stable_audio_{generation.seed}_{int(service.clock.time())}.wav",
        metadata=clip_metadata(generation, output.result, duration_s=duration_s)
        | {"detected_bpm": read_tempo(body.prompt)},
    )


async def make_style_clip(service: Service, request: Request, *, form: StyleForm) -> Response:
    """Handle `POST /generate/style-transfer`."""
    started_at = service.clock.monotonic()
    model = default_model(service)
    source = await read_upload(service, form.audio_file, model=model)
    generation = GenerationRequest(
        prompt=form.prompt,
        duration_s=model.window_s,
        conditioned_total_s=model.conditioned_s,
        seed=resolve_seed(form.seed),
        negative_prompt=form.negative_prompt,
        steps=model.steps(form.steps, at_most=100),
        cfg_scale=form.cfg_scale,
        init_audio=source,
        init_noise_level=form.style_strength,
        request_id=request.state.request_id,
    )
    output = await make_clip(service, request, card=model.card, generation=generation, started_at=started_at)
    window_s = round(model.window_s)  # the original server also returns whole seconds: 12 for a clip of 11.9 s
    num_samples = source.resampled_length(to_hz=model.card.sample_rate_hz)
    return await answer(
        service,
        output,
        return_format=form.return_format,
        name=f"style_transfer_{generation.seed}_{int(service.clock.time())}.wav",
        metadata=clip_metadata(generation, output.result, duration_s=window_s)
        | {
            "detected_bpm": read_tempo(form.prompt),
            "style_strength": form.style_strength,
            "input_audio_shape": [model.card.channels, num_samples],
        },
    )


async def read_upload(service: Service, upload: UploadFile, *, model: WindowedModel) -> SourceAudio:
    """Return the part of an upload that the model can use, mixed to mono.

    It is copied to all channels of the model before encoding. Raises InvalidUploadError, UploadTooLargeError.
    """
    audio = await service.decode(upload, model.card, padding_s=None, field="audio_file")
    return await service.compute(audio.to_mono)


async def make_clip(
    service: Service,
    request: Request,
    *,
    card: ModelCard,
    generation: GenerationRequest,
    started_at: float,
    num_samples: int | None = None,
) -> Output:
    """Run a generation like `Service.generate`, and encode its first `num_samples` samples, with the peak at 1."""
    card, generation = service.adapted(card, generation)
    note(request.scope, model=card.name, duration_s=generation.duration_s, batch_size=1)
    result = await service.generate(card, generation, caller=request.state.caller, started_at=started_at)
    origin = ClipOrigin.of(generation) if service.settings.dialects.recipes else None
    output = await service.finish_by(result, lambda: finish_window(result, num_samples=num_samples, origin=origin))
    note(request.scope, num_bytes=output.file.num_bytes)
    return output


def length_s(result: GenerationResult) -> float:
    """Return the length of the audio that the model generated, in seconds."""
    return result.audio[0].shape[1] / result.sample_rate_hz


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


def clip_metadata(generation: GenerationRequest, result: GenerationResult, *, duration_s: float) -> dict[str, Any]:
    """Return the metadata that `/generate` returns with a clip, except the tempo."""
    generation_s = result.timings.total_ms / 1000
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
