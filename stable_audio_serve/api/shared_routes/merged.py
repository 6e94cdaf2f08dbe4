"""`POST /generate`, a path of two dialects: Stable Audio 3 and Stable Audio Open Small.

The fields of a request decide which of the two dialects handles the request. An error response has the status that the
chosen dialect defines, and the error fields of both dialects.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ValidationError
from starlette.responses import JSONResponse, Response

from stable_audio_serve.api.compat.stable_audio_open_small.clips import base64_answer, clip_metadata, make_text_clip
from stable_audio_serve.api.compat.stable_audio_open_small.errors import describe_error, name_field
from stable_audio_serve.api.compat.stable_audio_open_small.routes import Base64Answer, read_json
from stable_audio_serve.api.compat.stable_audio_open_small.schemas import (
    Format,
    GenerateBody,
    LoopForm,
    RiffForm,
    StyleForm,
    parse,
)
from stable_audio_serve.api.description import error_responses
from stable_audio_serve.api.native.errors import describe_error as describe_sa3_error
from stable_audio_serve.api.native.ignored import warning_headers
from stable_audio_serve.api.native.routes import MEDIA_TYPES, audio_answer, convert, run
from stable_audio_serve.api.native.schemas import GenerationBody
from stable_audio_serve.api.refusals import ExpectedError, invalid_body
from stable_audio_serve.api.routing import route_class
from stable_audio_serve.api.service import Service
from stable_audio_serve.audio.loops import read_tempo

TAG = "Generate"

# The fields that only Stable Audio 3 has. A request with one of them is for Stable Audio 3. Fields of any form of Open
# Small do not count, because its clients may send the fields of one route to another, which ignores them.
_OPEN_SMALL = (GenerateBody, LoopForm, RiffForm, StyleForm)
ONLY_SA3 = GenerationBody.model_fields.keys() - {name for form in _OPEN_SMALL for name in form.model_fields}

_BINARY = {"schema": {"type": "string", "format": "binary"}}


class MergedError(BaseModel):
    """Any error: a sentence, and the details of Stable Audio 3's API."""

    error: str
    detail: str | list[dict[str, Any]]


_OWN = {
    400: "An Open Small field is invalid, or the model refuses the request.",
    422: "A field of a Stable Audio 3 request is invalid.",
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A WAV file, a ZIP of several variations, or JSON with return_format base64.",
        "model": Base64Answer,
        "content": dict.fromkeys(MEDIA_TYPES, _BINARY),
    },
    **error_responses(MergedError, 401, 408, 413, 429, 500, 503, 504, own=_OWN),
}


class Sa3Body(GenerationBody):
    """A Stable Audio 3 request that may also have `return_format`, a field of the other dialect."""

    return_format: Format | None = None


def build_router(service: Service) -> APIRouter:
    """Return the shared route."""
    router = APIRouter(route_class=route_class(render_error, scopes=("generate",)), tags=[TAG])
    schemas = [{"$ref": "#/components/schemas/GenerationBody"}, GenerateBody.model_json_schema()]
    body = {"required": True, "content": {"application/json": {"schema": {"anyOf": schemas}}}}

    @router.post(
        "/generate",
        summary="Generate (Stable Audio 3 or Open Small)",
        response_class=Response,
        responses=_RESPONSES,
        openapi_extra={"requestBody": body},
    )
    async def generate(request: Request) -> Response:
        """Generate audio from a text prompt. A request with any field that only Stable Audio 3 has uses that API."""
        values = await read_json(request)
        if not ONLY_SA3 & values.keys():
            return await make_text_clip(service, request, body=parse(GenerateBody, values))
        request.state.is_sa3 = True
        return await _generate_sa3(service, request, values=values)

    return router


def render_error(request: Request, error: ExpectedError) -> Response:
    """Return the response to an expected error. It has `error` and `detail`, the error fields of the two dialects."""
    if getattr(request.state, "is_sa3", False):
        status, body, headers = describe_sa3_error(request, error)
        faults = body["detail"]
        sentence = faults if isinstance(faults, str) else name_field(str(faults[0]["loc"][-1]), faults[0]["msg"])
        return JSONResponse({**body, "error": sentence}, status, headers=headers)
    description = describe_error(request, error)
    body = {**description.body(), "detail": description.faults or description.sentence}
    return JSONResponse(body, description.status, headers=description.headers)


async def _generate_sa3(service: Service, request: Request, *, values: dict[str, Any]) -> Response:
    started_at = service.clock.monotonic()
    try:
        body = Sa3Body.model_validate(values)
    except ValidationError as error:
        raise invalid_body(error) from error
    card, generation = convert(service, request, fields=body)
    output = await run(service, request, card=card, generation=generation, fields=body, started_at=started_at)
    if body.return_format != "base64":
        return audio_answer(request, output, file_format=body.response_format)
    result = output.result
    metadata = clip_metadata(
        replace(generation, cfg_scale=card.default_cfg_scale if generation.cfg_scale is None else generation.cfg_scale),
        result,
        duration_s=round(result.audio[0].shape[1] / result.sample_rate_hz, 2),
    )
    answer = await base64_answer(service, output, metadata=metadata | {"detected_bpm": read_tempo(generation.prompt)})
    answer.headers.update(warning_headers(request, result.made_on))
    return answer
