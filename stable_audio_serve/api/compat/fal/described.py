"""Descriptions of fal's endpoints, as fal serves them. Each endpoint has an OpenAPI document and a Markdown text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from stable_audio_serve.api.compat.fal.endpoints import ENDPOINTS
from stable_audio_serve.api.compat.fal.errors import render_error
from stable_audio_serve.api.compat.fal.wire import (
    APP,
    AudioInput,
    AudioOutput,
    CancelReply,
    Completed,
    InProgress,
    PromptedOutput,
    Queued,
    SeededOutput,
    Ticket,
    errors,
)
from stable_audio_serve.api.compat.hosted import File
from stable_audio_serve.api.links import base_url
from stable_audio_serve.api.routing import public_route_class
from stable_audio_serve.api.service import Service

_RESPONSES = errors(own={404: "There is no such endpoint.", 422: "The parameter is missing."})
_SCHEMAS = "#/components/schemas/"


def build_description_router(service: Service) -> APIRouter:
    """Return the routes, which need no key."""
    router = APIRouter(route_class=public_route_class(render_error))

    @router.get("/api/openapi/queue/openapi.json", summary="Describe An Endpoint (fal)", responses=_RESPONSES)
    async def describe(
        request: Request, endpoint_id: Annotated[str, Query(description=f"For example `{APP}`.")]
    ) -> dict[str, Any]:
        """Return the OpenAPI document of one endpoint."""
        given, output = _models(endpoint_id)
        return {
            "openapi": "3.1.0",
            "info": {"title": f"Queue OpenAPI for {endpoint_id}", "version": "1.0.0"},
            "components": {"schemas": _schemas(given, output, Ticket, Queued, InProgress, Completed, CancelReply)},
            "paths": _paths(endpoint_id, given=given, output=output),
            "servers": [{"url": f"{base_url(request, service.settings.api)}/queue"}],
        }

    @router.get(
        "/models/{endpoint_id:path}/llms.txt",
        summary="Explain An Endpoint (fal)",
        response_class=PlainTextResponse,
        responses=_RESPONSES,
    )
    async def explain(request: Request, endpoint_id: str) -> str:
        """Return a description of one endpoint as Markdown."""
        given, output = _models(endpoint_id)
        parts: dict[str, type[BaseModel]] = {"Input": given, "Output": output, "File": File}
        schemas = _schemas(*parts.values())
        lists = [_list(title, schemas[model.__name__]) for title, model in parts.items()]
        url = f"{base_url(request, service.settings.api)}/{endpoint_id}"
        return "\n\n".join([f"# {endpoint_id}", f"> POST {url}", *lists]) + "\n"

    return router


def _models(endpoint_id: str) -> tuple[type[BaseModel], type[BaseModel]]:
    """Return the models of an endpoint's input and output. Raises HTTPException 404."""
    if endpoint_id == APP:
        return AudioInput, AudioOutput
    endpoint = ENDPOINTS.get(endpoint_id)
    if endpoint is None:
        raise HTTPException(404, f"endpoint_id: there is no endpoint {endpoint_id[:100]!r}")
    return endpoint.schema, PromptedOutput if endpoint.model else SeededOutput


def _schemas(*models: type[BaseModel]) -> dict[str, dict[str, Any]]:
    _, found = models_json_schema([(model, "validation") for model in models], ref_template=f"{_SCHEMAS}{{model}}")
    schemas: dict[str, dict[str, Any]] = found["$defs"]
    for schema in schemas.values():
        schema["properties"].pop("peaks", None)  # an extension of this server, which fal's own documents lack
        schema["x-fal-order-properties"] = list(schema["properties"])
    return schemas


def _paths(endpoint_id: str, *, given: type[BaseModel], output: type[BaseModel]) -> dict[str, Any]:
    path = f"/{endpoint_id}"
    request = f"{path}/requests/{{request_id}}"
    parameter = {"name": "request_id", "in": "path", "required": True, "schema": {"type": "string"}}
    submission = {
        "requestBody": {"required": True, **_content(given)},
        "responses": {"200": _answer("Queued.", Ticket)},
    }
    watched = {"200": _answer("Ended.", Completed), "202": _answer("Queued or running.", Queued, InProgress)}
    cancelled = {"202": _answer("To be cancelled.", CancelReply)}
    return {
        path: {"post": submission},
        f"{request}/status": {"get": {"parameters": [parameter], "responses": watched}},
        request: {"get": {"parameters": [parameter], "responses": {"200": _answer("The output.", output)}}},
        f"{request}/cancel": {"put": {"parameters": [parameter], "responses": cancelled}},
    }


def _answer(description: str, *models: type[BaseModel]) -> dict[str, Any]:
    return {"description": description, **_content(*models)}


def _content(*models: type[BaseModel]) -> dict[str, Any]:
    first, *others = ({"$ref": _SCHEMAS + model.__name__} for model in models)
    return {"content": {"application/json": {"schema": {"anyOf": [first, *others]} if others else first}}}


def _list(title: str, schema: Mapping[str, Any]) -> str:
    required, lines = set(schema.get("required", ())), []
    for name, field in schema["properties"].items():
        kinds = [each.get("type") or each["$ref"].removeprefix(_SCHEMAS) for each in field.get("anyOf", [field])]
        facts = [" or ".join(kinds), "required" if name in required else f"default {json.dumps(field['default'])}"]
        facts += [f"{word} {field[key]:g}" for key, word in (("minimum", "from"), ("maximum", "to")) if key in field]
        facts += [f"one of {', '.join(field['enum'])}"] if "enum" in field else []
        lines.append(f"- `{name}` ({', '.join(facts)}): {field.get('description', '')}".rstrip(": "))
    return f"## {title}\n\n" + "\n".join(lines)
