"""Routes about the server, shared by several dialects: health, readiness and the served models.

Health and readiness never need a key. The list of models needs one if keys are configured.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stable_audio_serve.api.compat import elevenlabs
from stable_audio_serve.api.compat.vllm_omni import ErrorBody
from stable_audio_serve.api.compat.vllm_omni import render_error as render_openai_error
from stable_audio_serve.api.description import error_responses
from stable_audio_serve.api.middleware.api_keys import ELEVENLABS_HEADER
from stable_audio_serve.api.native.errors import render_error
from stable_audio_serve.api.native.schemas import ErrorBody as NativeErrorBody
from stable_audio_serve.api.refusals import ExpectedError
from stable_audio_serve.api.routing import probe_route_class, route_class
from stable_audio_serve.api.service import Service
from stable_audio_serve.api.shared_routes import info
from stable_audio_serve.core.catalog import ModelStatus
from stable_audio_serve.jobs.store.health import StoreHealth

TAG = "Server"
NAME: Final = "stable-audio-serve"

_RETRY_AFTER_S = "5"


def build_router(service: Service, *, dialect: str | None = None) -> APIRouter:
    """Return the routes for health and models, which are also available below the path prefix of each dialect.

    `dialect` is the name of the dialect, or None for the routes without a prefix. OpenAI's and ElevenLabs' clients
    request the list of models at the same path. Without a prefix, a request with ElevenLabs' key header gets
    ElevenLabs' list.
    """
    router = APIRouter(route_class=probe_route_class(render_error), tags=[TAG])

    async def look() -> tuple[Mapping[str, ModelStatus], StoreHealth]:
        status, job_store, _ = await asyncio.gather(
            service.backend.status(), service.jobs.watch.health(), service.keys.ring.refresh()
        )
        return status, job_store

    @router.head("/health", include_in_schema=False)
    @router.get(
        "/health", summary="Show health", responses={503: {"model": info.Health, "description": "All models failed."}}
    )
    async def health(response: Response) -> info.Health:
        """Return the state of the server and its models: 200 while the process runs, 503 if no model can be loaded.

        Below the prefix of Stable Audio 3, whose original server is always healthy, the status is 200 in any case.
        """
        status, job_store = await look()
        health = info.describe_health(service, status, job_store=job_store)
        if dialect != "sa3" and all(model.stage == "failed" for model in health.models.values()):
            response.status_code = 503
        if dialect == "vllm" and (health.status == "ok" or response.status_code == 503):  # vLLM's words
            health.status = "healthy" if health.status == "ok" else "unhealthy"
        return health

    @router.head("/ready", include_in_schema=False)
    @router.get(
        "/ready",
        summary="Show readiness",
        responses={503: {"model": info.Ready, "description": "Not ready; see `reasons`."}},
    )
    async def ready(response: Response) -> info.Ready:
        """Return whether the server accepts requests: 503 until the default model is ready and while it stops."""
        service.draining.check()
        status, job_store = await look()
        body = info.describe_ready(service, status, job_store=job_store)
        if not body.ready:
            response.status_code = 503
            response.headers["Retry-After"] = _RETRY_AFTER_S
        return body

    _add_lists(router, service, dialect=dialect)
    return router


def _add_lists(router: APIRouter, service: Service, *, dialect: str | None) -> None:
    """Add the routes that list the models and the adapters."""
    created_at = int(service.clock.time())

    def is_elevenlabs(request: Request) -> bool:
        return dialect == "elevenlabs" or (dialect is None and ELEVENLABS_HEADER in request.headers)

    def render_list_error(request: Request, error: ExpectedError) -> Response:
        render = elevenlabs.render_error if is_elevenlabs(request) else render_openai_error
        return render(request, error)

    async def list_models(request: Request, response: Response) -> info.ModelList | Response:
        """List the served models. A request with the header `xi-api-key` gets ElevenLabs' list."""
        headers = {"Vary": ELEVENLABS_HEADER}
        if is_elevenlabs(request):
            return JSONResponse(elevenlabs.list_models(service.backend.catalog), headers=headers)
        response.headers.update(headers)
        owner = "vllm" if dialect == "vllm" else NAME
        return info.describe_models(service, owned_by=owner, created_at=created_at)

    router.add_api_route(
        "/v1/models",
        list_models,
        methods=["GET"],
        response_model=info.ModelList,
        responses=error_responses(ErrorBody, 401, 500),
        route_class_override=route_class(render_list_error, scopes=()),
    )

    async def list_adapters() -> info.AdapterList:
        """List the adapters (LoRA) of the default model, or of the first model that takes some, as sa3.cpp does."""
        return info.describe_adapters(service, await service.backend.status())

    router.add_api_route(
        "/loras",
        list_adapters,
        methods=["GET"],
        responses=error_responses(NativeErrorBody, 401, 500),
        route_class_override=route_class(render_error, scopes=()),
    )
