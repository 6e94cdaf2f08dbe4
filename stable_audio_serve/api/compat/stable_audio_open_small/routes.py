"""The dialect's routes, except `/generate`, which `shared_routes.merged` handles for two dialects."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.responses import JSONResponse, Response

from stable_audio_serve.api.compat.stable_audio_open_small.clips import make_style_clip, make_text_clip
from stable_audio_serve.api.compat.stable_audio_open_small.errors import render_error
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
from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.keys import Scope

TAG = "Stable Audio Open Small"

_ENDPOINTS = {
    "/generate": "Text-to-audio generation",
    "/generate/loop": "BPM-aware loop generation (text or style transfer)",
    "/generate/style-transfer": "Audio-to-audio style transfer",
}
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
    **error_responses(Problem, 400, 401, 408, 413, 429, 500, 503, 504),
}


def request_body(form: type[Wire], *content_types: str) -> dict[str, Any]:
    """Return the OpenAPI description of a body that FastAPI does not parse."""
    schema = form.model_json_schema()
    texts = {name: field for name, field in schema["properties"].items() if name != "audio_file"}
    text_schema = schema | {"properties": texts}  # only multipart forms can hold a file
    content = {type_: {"schema": schema if type_ == _FORMS[0] else text_schema} for type_ in content_types}
    return {"requestBody": {"required": True, "content": content}}


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
        return await make_loop(service, request, form=parse(LoopForm, await _read_json_or_form(request)))

    @router.post(
        "/generate/style-transfer",
        response_class=Response,
        responses=RESPONSES,
        openapi_extra=request_body(StyleForm, _FORMS[0]),
    )
    async def transfer_style(request: Request) -> Response:
        """Generate a clip from uploaded audio and a prompt."""
        return await make_style_clip(service, request, form=parse(StyleForm, await _read_form(request)))

    @router.post(
        "/generate/loop-with-riff",
        response_class=Response,
        responses=RESPONSES,
        openapi_extra=request_body(RiffForm, *_FORMS),
    )
    async def loop_with_riff(request: Request) -> Response:
        """Generate a loop from a riff of the server's library and a prompt."""
        return await make_riff_loop(service, request, form=parse(RiffForm, await _read_form(request)), library=library)

    @router.head("/riffs/available", include_in_schema=False)
    @router.get("/riffs/available", responses=error_responses(Problem, 401, 500))
    async def list_riffs() -> dict[str, Any]:
        """List the server's riffs by key."""
        return library.describe()

    @router.head("/model/info", include_in_schema=False)
    @router.get("/model/info", responses=error_responses(Problem, 401, 500))
    async def model_info() -> dict[str, Any]:
        """Describe the model and the parameters that requests accept."""
        return _describe_model(model, await _status_of(service, model))

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
        code, body = _describe_health(model, await _status_of(service, model))
        return JSONResponse(body, code)

    return router


async def read_json(request: Request) -> dict[str, Any]:
    """Return the JSON object in a body of any content type. Raises InvalidRequestError."""
    try:
        values = await request.json()
    except json.JSONDecodeError as error:
        raise InvalidRequestError("JSON body required") from error
    if not isinstance(values, dict):
        raise InvalidRequestError("JSON body required")
    return values


async def _read_form(request: Request) -> dict[str, Any]:
    """Return the fields of a form, without empty file inputs. Raises HTTPException 400, 413.

    Of fields with the same name, the first one counts, as in Flask.
    """
    form = await request.form()
    return {name: value for name, value in reversed(form.multi_items()) if not _is_no_file(name, value)}


async def _read_json_or_form(request: Request) -> dict[str, Any]:
    """Return the fields of a form or JSON body. Raises the errors of `read_json` and `_read_form`.

    JSON has no uploads, so its `audio_file` is ignored, as by the original server.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type.endswith(("/json", "+json")):
        return {name: value for name, value in (await read_json(request)).items() if name != "audio_file"}
    return await _read_form(request)


def _is_no_file(name: str, value: object) -> bool:
    """Whether a file input is empty: browsers send a file without a name, and some libraries send an empty text."""
    if isinstance(value, UploadFile):
        return not value.filename and not value.size
    return name == "audio_file" and not value


def _scopes_of(request: Request) -> tuple[Scope, ...]:
    """Return the scopes of a route: POST needs the scope generate, and GET needs a key with any scope."""
    return ("generate",) if request.method == "POST" else ()


async def _status_of(service: Service, model: WindowedModel) -> ModelStatus:
    return (await service.backend.status()).get(model.card.name, ModelStatus("loading"))


def _describe_model(model: WindowedModel, status: ModelStatus) -> dict[str, Any]:
    """Return the response of `GET /model/info`: the model and the parameters that requests accept."""
    card = model.card
    return {
        "model_name": card.name,
        "device": status.device,
        "config": {
            **model.describe(),
            "io_channels": card.latent_channels,
            "max_duration_seconds": round(model.window_s),
        },
        "supported_endpoints": _ENDPOINTS,
        "supported_parameters": {
            "bars": {"default": "auto", "options": [1, 2, 4, 8], "type": "int"},
            "cfg_scale": {"default": 6.0, "range": "0-20", "type": "float"},
            "loop_type": {"default": "auto", "options": ["drums", "instruments", "auto"], "type": "string"},
            "negative_prompt": {"required": False, "type": "string"},
            "prompt": {"required": True, "type": "string"},
            "return_format": {"default": "file", "options": ["file", "base64"], "type": "string"},
            "seed": {"default": -1, "note": "-1 for random", "type": "int"},
            "steps": {"default": model.steps(None, at_most=100), "range": "1-100", "type": "int"},
            "style_strength": {"default": 0.8, "note": "For style transfer", "range": "0.1-1.0", "type": "float"},
        },
    }


def _describe_health(model: WindowedModel, status: ModelStatus) -> tuple[int, dict[str, Any]]:
    """Return the status code and the body of the dialect's `GET /health`. A model that is still loading is healthy."""
    if status.stage == "failed":
        return 500, {"status": "error", "model_loaded": False, "error": "the model cannot be loaded"}
    return 200, {
        "status": "healthy",
        "model_loaded": status.stage == "ready",
        "device": status.device,
        "cuda_available": (status.device or "").startswith("cuda"),
        "model_info": model.describe(),
    }
