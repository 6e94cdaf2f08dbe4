"""vLLM's routes to load and unload adapters (LoRA) while the server runs. They need a key with the scope `admin`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.responses import PlainTextResponse, Response

from stable_audio_serve.api.compat.vllm_omni import ErrorBody, render_error
from stable_audio_serve.api.description import error_responses
from stable_audio_serve.api.operator_routes.status import TAG
from stable_audio_serve.api.routing import operator_route_class
from stable_audio_serve.api.service import Service
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.errors import ConflictError, InvalidRequestError, NotFoundError

_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "A sentence.", "content": {"text/plain": {"schema": {"type": "string"}}}},
    **error_responses(ErrorBody, 401, 408, 413, 500, 503, own={404: "No such model or adapter."}),
}
_NOT_LOADED = {400: "The file cannot be used, or the model has another adapter of this name."}
_NOT_UNLOADED = {
    400: "A field is missing or of the wrong type.",
    409: "The adapter is part of the configuration or of a folder.",
}
_LOAD_RESPONSES = _RESPONSES | error_responses(ErrorBody, own=_NOT_LOADED)
_UNLOAD_RESPONSES = _RESPONSES | error_responses(ErrorBody, own=_NOT_UNLOADED)


class LoadAdapter(BaseModel):
    """vLLM's fields, then extensions."""

    lora_name: str = Field(min_length=1, max_length=100, description="Name in requests.", examples=["vinyl"])
    lora_path: str = Field(
        min_length=1,
        max_length=2048,
        description="File on the server's machines, https or S3 URL, or owner/repository of the hub, also with a file.",
        examples=["/adapters/vinyl.safetensors"],
    )
    model: str | None = Field(None, description="Extension: the model; unset = the default model.")


class UnloadAdapter(BaseModel):
    """vLLM's fields, then extensions."""

    lora_name: str = Field(min_length=1, max_length=100, description="Name in requests.", examples=["vinyl"])
    model: str | None = Field(None, description="Extension: the model; unset = all models that have it.")


def build_router(service: Service) -> APIRouter:
    """Return the routes of one service."""
    router = APIRouter(
        prefix="/v1",
        route_class=operator_route_class(render_error, scopes=("admin",)),
        tags=[TAG],
        strict_content_type=False,
    )
    catalog, adapters = service.backend.catalog, service.adapters

    @router.post("/load_lora_adapter", summary="Load Adapter", response_class=Response, responses=_LOAD_RESPONSES)
    async def load(body: LoadAdapter) -> PlainTextResponse:
        """Add an adapter to a model, on all replicas, until it is unloaded. It is kept over restarts."""
        model = catalog.default if body.model is None else catalog.find(body.model)
        try:
            await adapters.load(model, name=body.lora_name, source=body.lora_path)
        except ConflictError as error:
            raise InvalidRequestError(error.message, field="lora_name") from error
        except InvalidRequestError as error:
            field = "lora_path" if error.field == "loras" else error.field
            raise InvalidRequestError(error.message, field=field, allowed=error.allowed) from error
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/unload_lora_adapter", summary="Unload Adapter", response_class=Response, responses=_UNLOAD_RESPONSES)
    async def unload(body: UnloadAdapter) -> PlainTextResponse:
        """Remove an adapter that was loaded while the server ran. Requests in progress finish with it."""
        kept: ConflictError | None = None
        num_removed = 0
        for model in _models_with(body):
            try:
                await adapters.unload(model, name=body.lora_name)
                num_removed += 1
            except ConflictError as error:
                kept = error
        if not num_removed:
            raise kept or NotFoundError(f"The lora adapter '{body.lora_name}' cannot be found.", field="lora_name")
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    def _models_with(body: UnloadAdapter) -> list[ModelCard]:
        if body.model is not None:
            return [catalog.find(body.model)]
        return [catalog.find(card.model) for card in adapters.cards() if card.name == body.lora_name]

    return router
