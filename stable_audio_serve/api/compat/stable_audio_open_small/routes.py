"""The dialect's routes, except `/generate`, which `shared_routes.merged` handles for two dialects."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from stable_audio_serve.api.compat.stable_audio_open_small.errors import render_error
from stable_audio_serve.api.compat.stable_audio_open_small.forms import read_form, read_json, read_json_or_form
from stable_audio_serve.api.compat.stable_audio_open_small.generate import make_style_clip, make_text_clip
from stable_audio_serve.api.compat.stable_audio_open_small.info import describe_health, describe_model
from stable_audio_serve.api.compat.stable_audio_open_small.loops import make_loop, make_riff_loop
from stable_audio_serve.api.compat.stable_audio_open_small.riffs import RiffLibrary, find_folder
from stable_audio_serve.api.compat.stable_audio_open_small.schemas import (
    GenerateBody,
    LoopForm,
    RiffForm,
    StyleForm,
    Wire,
    parse,
)
from stable_audio_serve.api.compat.stable_audio_open_small.windowed_model import WindowedModel, default_model
from stable_audio_serve.api.description import error_responses
from stable_audio_serve.api.routing import probe_route_class, route_class
from stable_audio_serve.api.service import Service
from stable_audio_serve.core.catalog import ModelStatus
from stable_audio_serve.core.keys import Scope

TAG = "Stable Audio Open Small"

_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


class Base64Answer(BaseModel):
    """A clip, for `return_format` base64."""

    success: bool
    audio_base64: str
    metadata: dict[str, Any]


class Problem(BaseModel):
    """An error in one sentence. `success` is false for server errors."""

    error: str
    success: bool | None = None


class OwnHealth(BaseModel):
    """Health of the model of these routes. The optional fields are present unless the model failed to load."""

    status: str
    model_loaded: bool
    device: str | None = None
    cuda_available: bool | None = None
    model_info: dict[str, Any] | None = None
    error: str | None = None


RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A WAV file, or JSON with return_format base64.",
        "model": Base64Answer,
        "content": {"audio/wav": {"schema": {"type": "string", "format": "binary"}}},
    },
    400: {"model": Problem, "description": "A field is missing, of the wrong type or out of range."},
    **error_responses(Problem, 401, 408, 413, 429, 500, 503, 504),
}


def request_body(form: type[Wire], *content_types: str) -> dict[str, Any]:
    """Return the OpenAPI description of a body that FastAPI does not parse."""
    content = {content_type: {"schema": _schema(form, content_type)} for content_type in content_types}
    return {"requestBody": {"required": True, "content": content}}


def _schema(form: type[Wire], content_type: str) -> dict[str, Any]:
    schema = form.model_json_schema()
    if content_type != _FORMS[0]:  # only multipart forms can hold a file
        schema["properties"].pop("audio_file", None)
    return schema


def build_router(service: Service) -> APIRouter:
    """Return the dialect's routes. Reads the riff folder."""
    router = APIRouter(route_class=route_class(render_error, scopes=_scopes_of), tags=[TAG])
    library = RiffLibrary(find_folder(service.settings.dialects.riff_dir))
    model = default_model(service)

    @router.post("/generate", include_in_schema=False)
    async def generate(request: Request) -> Response:
        return await make_text_clip(service, request, body=parse(GenerateBody, await read_json(request)))

    @router.post(
        "/generate/loop",
        response_class=Response,
        responses=RESPONSES,
        openapi_extra=request_body(LoopForm, *_FORMS, "application/json"),
    )
    async def loop(request: Request) -> Response:
        """Generate a loop of whole bars, at the tempo in the prompt."""
        return await make_loop(service, request, form=parse(LoopForm, await read_json_or_form(request)))

    @router.post(
        "/generate/style-transfer",
        response_class=Response,
        responses=RESPONSES,
        openapi_extra=request_body(StyleForm, _FORMS[0]),
    )
    async def transfer_style(request: Request) -> Response:
        """Generate a clip from uploaded audio and a prompt."""
        return await make_style_clip(service, request, form=parse(StyleForm, await read_form(request)))

    @router.post(
        "/generate/loop-with-riff",
        response_class=Response,
        responses=RESPONSES,
        openapi_extra=request_body(RiffForm, *_FORMS),
    )
    async def loop_with_riff(request: Request) -> Response:
        """Generate a loop from a riff of the server's library and a prompt."""
        return await make_riff_loop(service, request, form=parse(RiffForm, await read_form(request)), library=library)

    @router.get("/riffs/available", responses=error_responses(Problem, 401, 500))
    async def list_riffs() -> dict[str, Any]:
        """List the server's riffs by key."""
        return library.describe()

    @router.get("/model/info", responses=error_responses(Problem, 401, 500))
    async def model_info() -> dict[str, Any]:
        """Describe the model and the parameters that requests accept."""
        return describe_model(model, await _status_of(service, model))

    return router


def build_health_router(service: Service) -> APIRouter:
    """Return the dialect's health route. The health route of the other dialects has a different response."""
    router = APIRouter(route_class=probe_route_class(render_error), tags=[TAG])
    model = default_model(service)

    @router.head("/health", include_in_schema=False)
    @router.get(
        "/health",
        summary="Show health (Open Small)",
        response_class=JSONResponse,
        responses={200: {"model": OwnHealth}, 500: {"model": OwnHealth, "description": "The model failed to load."}},
    )
    async def health() -> Response:
        """Return the health of the model of these routes."""
        code, body = describe_health(model, await _status_of(service, model))
        return JSONResponse(body, code)

    return router


def _scopes_of(request: Request) -> tuple[Scope, ...]:
    """Return the scopes of a route: POST needs the scope generate, and GET needs a key with any scope."""
    return ("generate",) if request.method == "POST" else ()


async def _status_of(service: Service, model: WindowedModel) -> ModelStatus:
    return (await service.status()).get(model.card.name, ModelStatus("loading"))
