"""The route of vLLM-Omni's audio generation."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from starlette.responses import Response

from stable_audio_serve.api.answers import SOUND_HEADERS, encoded_answer, result_headers
from stable_audio_serve.api.compat.vllm_omni.convert import make_file, resolve_span, to_request
from stable_audio_serve.api.compat.vllm_omni.errors import render_error, unknown_model
from stable_audio_serve.api.compat.vllm_omni.schemas import AudioBody, ErrorBody
from stable_audio_serve.api.description import error_responses
from stable_audio_serve.api.middleware.observe import note
from stable_audio_serve.api.routing import route_class
from stable_audio_serve.api.service import Service
from stable_audio_serve.core.catalog import OPEN_FAMILY, ModelCard
from stable_audio_serve.core.errors import UnknownModelError

TAG = "vLLM-Omni"

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_MEDIA_TYPES = ("audio/wav", "audio/pcm", "audio/flac", "audio/mpeg", "audio/ogg")
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The audio file.",
        "content": dict.fromkeys(_MEDIA_TYPES, _BINARY),
        "headers": SOUND_HEADERS,
    },
    400: {"model": ErrorBody, "description": "A field is missing, of the wrong type or out of range."},
    404: {"model": ErrorBody, "description": "The model is not served."},
    **error_responses(ErrorBody, 401, 408, 413, 429, 500, 503, 504),
}


def build_router(service: Service) -> APIRouter:
    """Return the dialect's route."""
    router = APIRouter(route_class=route_class(render_error, scopes=("generate",)), tags=[TAG])

    @router.post(
        "/v1/audio/generate",
        summary="Generate (vLLM-Omni)",
        response_class=Response,
        responses=_RESPONSES,
        dependencies=[Depends(_require_json)],
    )
    async def generate(request: Request, body: AudioBody) -> Response:
        """Generate one clip from a text prompt."""
        started_at = service.clock.monotonic()
        if body.stream_format == "sse":
            raise _fault("body", "stream_format", message="sse is not supported yet; use audio")
        card = _resolve_model(service, body)
        span = resolve_span(body, cap_s=card.max_duration_s)
        generation = to_request(body, card, span=span, request_id=request.state.request_id)
        note(request.scope, model=card.name, duration_s=generation.duration_s)
        result = await service.generate(card, generation, caller=request.state.caller, started_at=started_at)
        output = await service.finish_by(
            result, lambda: make_file(body, span=span, result=result, settings=service.settings.audio)
        )
        note(request.scope, num_bytes=output.file.num_bytes)
        return encoded_answer(output.file, result_headers(output))

    return router


def _resolve_model(service: Service, body: AudioBody) -> ModelCard:
    catalog = service.backend.catalog
    if body.model is None:
        return catalog.choose(service.settings.dialects.model, family=OPEN_FAMILY)
    try:
        return catalog.resolve(body.model)
    except UnknownModelError as error:
        raise unknown_model(body.model) from error


def _require_json(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise _fault("header", "Content-Type", message="must be application/json")


def _fault(place: str, field: str, *, message: str) -> RequestValidationError:
    return RequestValidationError([{"type": "value_error", "loc": (place, field), "msg": message, "input": None}])
