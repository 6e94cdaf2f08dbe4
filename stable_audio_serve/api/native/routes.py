"""Synchronous routes of the native API: text to audio, variations and inpainting."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request
from starlette.responses import Response

from stable_audio_serve.api.answers import RECIPE_HEADER, SOUND_HEADERS, attachment, encoded_answer, result_headers
from stable_audio_serve.api.description import error_responses
from stable_audio_serve.api.middleware.observe import note
from stable_audio_serve.api.native.convert import (
    parse_sampler_kwargs,
    to_edit,
    to_encoding,
    to_finishing,
    to_request,
    unused_options,
)
from stable_audio_serve.api.native.edits import check_edit, starts_from_source, to_inpainting
from stable_audio_serve.api.native.errors import render_error
from stable_audio_serve.api.native.ignored import WARNING_HEADER, check_names, warning_headers
from stable_audio_serve.api.native.schemas import (
    ErrorBody,
    Fields,
    GenerationBody,
    InpaintForm,
    ValidationErrors,
    VariationForm,
)
from stable_audio_serve.api.routing import route_class
from stable_audio_serve.api.service import Output, Service
from stable_audio_serve.audio.finish import ClipOrigin, FileOrder
from stable_audio_serve.audio.formats import media_types
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.core.sound import AudioFormat

TAG = "Stable Audio 3"

_MULTIPART = Form(media_type="multipart/form-data")
_BINARY = {"schema": {"type": "string", "format": "binary"}}
MEDIA_TYPES = ("audio/wav", "application/zip", *media_types())
AUDIO_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One audio file, or a ZIP of several variations.",
        "content": dict.fromkeys(MEDIA_TYPES, _BINARY),
        "headers": {
            "X-Model": {"schema": {"type": "string"}, "description": "Canonical name of the model."},
            "X-Sample-Rate": {"schema": {"type": "integer"}, "description": "Hertz."},
            "X-Output-Count": {"schema": {"type": "integer"}, "description": "Number of variations."},
            **SOUND_HEADERS,
            **RECIPE_HEADER,
            **WARNING_HEADER,
            "Server-Timing": {"schema": {"type": "string"}, "description": "Duration of each stage, milliseconds."},
        },
    },
    400: {
        "model": ErrorBody,
        "description": "The upload or the inpaint times are invalid, or the model refuses the request.",
    },
    422: {"model": ValidationErrors, "description": "A field is missing, of the wrong type or out of range."},
    **error_responses(ErrorBody, 401, 408, 413, 429, 500, 503, 504),
}


def build_router(service: Service) -> APIRouter:
    """Return the synchronous routes."""
    router = APIRouter(
        route_class=route_class(render_error, scopes=("generate",)), tags=[TAG], strict_content_type=False
    )

    async def answer(request: Request, fields: Fields) -> Response:
        started_at = service.clock.monotonic()
        card, generation = await read_fields(service, request, fields=fields)
        output = await run(service, request, card=card, generation=generation, fields=fields, started_at=started_at)
        return audio_answer(request, output, file_format=fields.response_format)

    async def generate(request: Request, body: GenerationBody) -> Response:
        """Generate audio from a text prompt."""
        return await answer(request, body)

    router.post("/v1/audio/generations", response_class=Response, responses=AUDIO_RESPONSES)(generate)
    router.post("/generate", include_in_schema=False)(generate)

    @router.post("/v1/audio/variations", response_class=Response, responses=AUDIO_RESPONSES)
    async def vary(request: Request, form: Annotated[VariationForm, _MULTIPART]) -> Response:
        """Generate a variation of uploaded audio."""
        return await answer(request, form)

    @router.post("/v1/audio/inpaint", response_class=Response, responses=AUDIO_RESPONSES)
    async def inpaint(request: Request, form: Annotated[InpaintForm, _MULTIPART]) -> Response:
        """Regenerate regions of uploaded audio, or extend it before its start or after its end."""
        return await answer(request, form)

    return router


async def read_fields(service: Service, request: Request, *, fields: Fields) -> tuple[ModelCard, GenerationRequest]:
    """Return the model and the request for `fields`, with its source audio.

    Raises RequestValidationError, InvalidRequestError and the errors of `Service.decode`.
    """
    card, generation = convert(service, request, fields=fields)
    if isinstance(fields, InpaintForm):
        check_edit(fields, generation)
        source = await service.decode(fields.audio, card, padding_s=generation.duration_padding_s)
        generation = to_inpainting(generation, fields, source=source, card=card, limits=service.settings.api)
        note(request.scope, duration_s=generation.duration_s)
        init = source if starts_from_source(fields) else None
        return card, replace(generation, inpaint_audio=source, init_audio=init)
    if isinstance(fields, VariationForm):
        generation = to_edit(generation, fields, card=card)
        source = await service.decode(fields.audio, card, padding_s=generation.duration_padding_s)
        return card, replace(generation, init_audio=source)
    return card, generation


def convert(service: Service, request: Request, *, fields: Fields) -> tuple[ModelCard, GenerationRequest]:
    """Return the model and the request for `fields`. The request has no source audio. Raises RequestValidationError.

    The result has the names of adapters, but not their files, see `Service.adapted`. Also records which fields have no
    effect, so that the response can name them.
    """
    sampler_kwargs = parse_sampler_kwargs(fields.sampler_kwargs)
    card, generation = to_request(
        fields,
        sampler_kwargs,
        catalog=service.backend.catalog,
        limits=service.settings.api,
        request_id=request.state.request_id,
    )
    note(request.scope, model=card.name, duration_s=generation.duration_s, batch_size=generation.batch_size)
    if names := [*card.loras, *(lora.name for lora in generation.loras)]:
        note(request.scope, loras="+".join(names))
    unused = [f"sampler_kwargs.{key}" for key in unused_options(sampler_kwargs, card)]
    check_names(request, [*(fields.model_extra or ()), *unused], limits=service.settings.api)
    return card, generation


async def run(
    service: Service,
    request: Request,
    *,
    card: ModelCard,
    generation: GenerationRequest,
    fields: Fields,
    started_at: float,
) -> Output:
    """Run a generation like `Service.generate`, and encode its file. Also raises RequestValidationError."""
    card, generation = service.adapted(card, generation)
    order = FileOrder(
        fields.peaks or service.settings.audio.peaks,
        encoding=to_encoding(fields),
        stem=file_stem(card.name),
        with_manifest=fields.manifest,
        origin=ClipOrigin.of(generation),
        finishing=to_finishing(fields, generation),
    )
    result = await service.generate(card, generation, caller=request.state.caller, started_at=started_at)
    output = await service.finish(result, order)
    note(request.scope, num_bytes=output.file.num_bytes)
    return output


def audio_answer(request: Request, output: Output, *, file_format: AudioFormat) -> Response:
    """Return the response with an audio file, or with a ZIP archive of several variations."""
    stem = file_stem(output.result.model)
    name = f"{stem}.{file_format}" if len(output.result.audio) == 1 else f"{stem}-batch.zip"
    headers = attachment(name) | result_headers(output) | warning_headers(request, output.result.made_on)
    return encoded_answer(output.file, headers)


def file_stem(model: str) -> str:
    """Return the name of a model's files: `stable-audio-3-<model>`, or `model` if it begins with `stable-audio-`."""
    return model if model.startswith("stable-audio-") else f"stable-audio-3-{model}"
