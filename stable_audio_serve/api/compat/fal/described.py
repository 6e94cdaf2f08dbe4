"""Descriptions of fal's endpoints, as fal serves them: an OpenAPI document and a text for language models of each."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from stable_audio_serve.api.compat.fal.endpoints import ENDPOINTS
from stable_audio_serve.api.compat.fal.errors import render_error
from stable_audio_serve.api.compat.fal.wire import APP, AudioInput, AudioOutput, FalError, PromptedOutput, SeededOutput
from stable_audio_serve.api.links import base_url
from stable_audio_serve.api.routing import public_route_class
from stable_audio_serve.api.service import Service

_RESPONSES: dict[int | str, dict[str, Any]] = {
    404: {"model": FalError, "description": "There is no such endpoint."},
    422: {"model": FalError, "description": "The parameter is missing."},
}
_SCHEMAS = "#/components/schemas/"


def build_description_router(service: Service) -> APIRouter:
    """Return the routes, which need no key."""
    router = APIRouter(route_class=public_route_class(render_error))

    @router.get("/api/openapi/queue/openapi.json", summary="Describe An Endpoint (fal)", responses=_RESPONSES)
    async def describe(
        request: Request, endpoint_id: Annotated[str, Query(description=f"For example `{APP}`.")]
    ) -> dict[str, Any]:
        """Return the OpenAPI document of one endpoint."""
        schemas: dict[str, Any] = {}
        names = []
        for model in _models(endpoint_id):
            schema = model.model_json_schema(ref_template=_SCHEMAS + "{model}", mode="validation")
            schemas |= schema.pop("$defs", {})
            schema["x-fal-order-properties"] = list(schema["properties"])
            names.append(schema["title"])
            schemas[names[-1]] = schema
        given, output = ({"content": {"application/json": {"schema": {"$ref": _SCHEMAS + name}}}} for name in names)
        answer = {"200": {"description": "The output, or from the queue a ticket.", **output}}
        return {
            "openapi": "3.1.0",
            "info": {"title": f"Queue OpenAPI for {endpoint_id}", "version": "1.0.0"},
            "components": {"schemas": schemas},
            "paths": {f"/{endpoint_id}": {"post": {"requestBody": {"required": True, **given}, "responses": answer}}},
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
        url = f"{base_url(request, service.settings.api)}/{endpoint_id}"
        return f"# {endpoint_id}\n\n> POST {url}\n\n## Input\n\n{_list(given)}\n\n## Output\n\n{_list(output)}\n"

    return router


def _models(endpoint_id: str) -> tuple[type[BaseModel], type[BaseModel]]:
    """Return the models of an endpoint's input and output. Raises HTTPException 404."""
    if endpoint_id == APP:
        return AudioInput, AudioOutput
    endpoint = ENDPOINTS.get(endpoint_id)
    if endpoint is None:
        raise HTTPException(404, f"endpoint_id: there is no endpoint {endpoint_id[:100]!r}")
    return endpoint.schema, PromptedOutput if endpoint.model else SeededOutput


def _list(model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    required = set(schema.get("required", ()))
    lines = []
    for name, field in schema["properties"].items():
        facts = [field.get("type", ""), "required" if name in required else f"default {field.get('default')!r}"]
        facts += [f"{word} {field[key]}" for key, word in (("minimum", "from"), ("maximum", "to")) if key in field]
        lines.append(f"- `{name}` ({', '.join(filter(None, facts))}): {field.get('description', '')}".rstrip(": "))
    return "\n".join(lines)
