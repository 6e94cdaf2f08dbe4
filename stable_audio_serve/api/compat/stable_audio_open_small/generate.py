"""Clips from a text prompt, and style transfer from an upload."""

from __future__ import annotations

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response

from stable_audio_serve.api.compat.stable_audio_open_small.answers import answer, clip_metadata, make_clip
from stable_audio_serve.api.compat.stable_audio_open_small.schemas import GenerateBody, StyleForm
from stable_audio_serve.api.compat.stable_audio_open_small.windowed_model import (
    WindowedModel,
    default_model,
    find_model,
)
from stable_audio_serve.api.service import Service, resolve_seed
from stable_audio_serve.audio.loops import read_tempo
from stable_audio_serve.core.generation import GenerationRequest, SourceAudio


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
    clip = await make_clip(
        service, request, card=model.card, generation=generation, started_at=started_at, num_samples=num_samples
    )
    duration_s = round(clip.num_samples / clip.result.sample_rate_hz, 2)
    metadata = clip_metadata(generation, clip.result, duration_s=duration_s, generation_s=clip.generation_s)
    return await answer(
        service,
        clip.output,
        return_format=body.return_format,
        name=f"stable_audio_{generation.seed}_{int(service.clock.time())}.wav",
        metadata=metadata | {"detected_bpm": read_tempo(body.prompt)},
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
    clip = await make_clip(service, request, card=model.card, generation=generation, started_at=started_at)
    window_s = round(model.window_s)  # the original server also returns whole seconds: 12 for a clip of 11.9 s
    metadata = clip_metadata(generation, clip.result, duration_s=window_s, generation_s=clip.generation_s)
    num_samples = source.resampled_length(to_hz=model.card.sample_rate_hz)
    return await answer(
        service,
        clip.output,
        return_format=form.return_format,
        name=f"style_transfer_{generation.seed}_{int(service.clock.time())}.wav",
        metadata=metadata
        | {
            "detected_bpm": read_tempo(form.prompt),
            "style_strength": form.style_strength,
            "input_audio_shape": [model.card.channels, num_samples],
        },
    )


async def read_upload(service: Service, upload: UploadFile, *, model: WindowedModel) -> SourceAudio:
    """Return the part of an upload that the model can use, mixed to mono.

    Before encoding, the mono signal is copied to all channels of the model.

    Raises InvalidUploadError, UploadTooLargeError.
    """
    audio = await service.decode(upload, model.card, padding_s=None, field="audio_file")
    return await service.compute(audio.to_mono)
