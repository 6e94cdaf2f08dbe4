"""Our own routes: the Stable Audio 3 server's contract. Thin: parse, convert, run, answer."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request
from starlette.responses import Response

from stable_audio_serve.api.native import info
from stable_audio_serve.api.native.answers import audio_answer, file_stem
from stable_audio_serve.api.native.convert import parse_sampler_kwargs, to_request
from stable_audio_serve.api.native.errors import render_error
from stable_audio_serve.api.native.regions import parse_regions
from stable_audio_serve.api.native.schemas import (
    Controls,
    ErrorBody,
    GenerationBody,
    InpaintForm,
    ValidationErrors,
    VariationForm,
)
from stable_audio_serve.api.observe import note
from stable_audio_serve.api.routing import route_class
from stable_audio_serve.api.service import Service
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.generation import GenerationRequest

TAG = "Stable Audio 3"

_MULTIPART = Form(media_type="multipart/form-data")
_TIME_FIELDS = {name for name in InpaintForm.model_fields if name.startswith("inpaint_")}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_AUDIO_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One audio file, or a ZIP of several variations.",
        "content": {"audio/wav": _BINARY, "application/zip": _BINARY},
        "headers": {
            "X-Model": {"schema": {"type": "string"}, "description": "Canonical name of the model."},
            "X-Sample-Rate": {"schema": {"type": "integer"}, "description": "Hertz."},
            "X-Output-Count": {"schema": {"type": "integer"}, "description": "Variations."},
            "X-Seed": {"schema": {"type": "integer"}, "description": "Seed of the first variation."},
            "Server-Timing": {"schema": {"type": "string"}, "description": "Milliseconds per stage."},
        },
    },
    400: {"model": ErrorBody, "description": "The upload, the inpaint times or the model's own limits."},
    413: {"model": ErrorBody, "description": "Upload or body too large."},
    422: {"model": ValidationErrors, "description": "A field is missing, of the wrong type or out of range."},
    503: {"model": ErrorBody, "description": "No room now; Retry-After says when to come again."},
    504: {"model": ErrorBody, "description": "The time budget ran out."},
}


def build_router(service: Service) -> APIRouter:
    """The routes over one service."""
    router = APIRouter(route_class=route_class(render_error), tags=[TAG], strict_content_type=False)
    created_at = int(time.time())

    def convert(
        request: Request, fields: Controls, sampler_kwargs: dict[str, Any]
    ) -> tuple[ModelCard, GenerationRequest]:
        card, generation = to_request(
            fields,
            sampler_kwargs,
            catalog=service.backend.catalog,
            limits=service.settings.api,
            request_id=request.state.request_id,
        )
        note(request.scope, model=card.name, duration_s=generation.duration_s, batch_size=generation.batch_size)
        return card, generation

    async def answer(
        request: Request, fields: Controls, card: ModelCard, generation: GenerationRequest, *, started_at: float
    ) -> Response:
        result = await service.generate(card, generation, started_at=started_at)
        output = await service.encode(result, fields.response_format, stem=file_stem(card.name))
        note(request.scope, num_bytes=output.file.num_bytes)
        return audio_answer(output, fields.response_format)

    async def generate(request: Request, body: GenerationBody) -> Response:
        """Make audio from a text prompt."""
        started_at = service.clock.monotonic()
        card, generation = convert(request, body, body.sampler_kwargs)
        return await answer(request, body, card, generation, started_at=started_at)

    router.post("/v1/audio/generations", response_class=Response, responses=_AUDIO_RESPONSES)(generate)
    router.post("/generate", include_in_schema=False)(generate)

    @router.post("/v1/audio/variations", response_class=Response, responses=_AUDIO_RESPONSES)
    async def vary(request: Request, form: Annotated[VariationForm, _MULTIPART]) -> Response:
        """Make a variation of uploaded audio."""
        started_at = service.clock.monotonic()
        card, generation = convert(request, form, parse_sampler_kwargs(form.sampler_kwargs))
        source = await service.decode(form.audio, card, padding_s=generation.duration_padding_s)
        generation = replace(generation, init_audio=source, init_noise_level=form.init_noise_level)
        return await answer(request, form, card, generation, started_at=started_at)

    @router.post("/v1/audio/inpaint", response_class=Response, responses=_AUDIO_RESPONSES)
    async def inpaint(request: Request, form: Annotated[InpaintForm, _MULTIPART]) -> Response:
        """Regenerate regions of uploaded audio, or continue it behind its end."""
        started_at = service.clock.monotonic()
        card, generation = convert(request, form, parse_sampler_kwargs(form.sampler_kwargs))
        regions = parse_regions(form.model_dump(include=_TIME_FIELDS), duration_s=generation.duration_s)
        source = await service.decode(form.audio, card, padding_s=generation.duration_padding_s)
        generation = replace(generation, inpaint_audio=source, inpaint_regions_s=regions)
        return await answer(request, form, card, generation, started_at=started_at)

    @router.get("/health", responses={503: {"model": info.Health, "description": "No model can be loaded."}})
    async def health(response: Response) -> info.Health:
        """Whether the server can work, its models and its limits. Never loads a model."""
        body = info.describe_health(service, await service.status())
        response.status_code = 200 if body.healthy else 503
        return body

    @router.get("/v1/models")
    async def list_models() -> info.ModelList:
        """The served models."""
        return info.describe_models(service, created_at=created_at)

    return router
