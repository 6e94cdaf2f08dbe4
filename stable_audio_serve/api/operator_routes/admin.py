"""Routes for administrators: keep models loaded, drain the server. They need a key with the scope `admin`."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.exceptions import HTTPException

from stable_audio_serve.api.description import error_responses
from stable_audio_serve.api.native.errors import render_error
from stable_audio_serve.api.native.schemas import ErrorBody
from stable_audio_serve.api.operator_routes import dead_letters
from stable_audio_serve.api.operator_routes.schemas import Drain, KeptModel
from stable_audio_serve.api.operator_routes.status import TAG, describe_drain
from stable_audio_serve.api.routing import operator_route_class
from stable_audio_serve.api.service import Service
from stable_audio_serve.core.catalog import ModelStatus
from stable_audio_serve.core.errors import ConflictError, UnknownModelError
from stable_audio_serve.core.operations import Operations
from stable_audio_serve.core.settings_sources import least_replicas

PREFIX = "/v1/admin"

_RESPONSES = error_responses(ErrorBody, 401, 500, 503)
_LOAD_RESPONSES = _RESPONSES | error_responses(ErrorBody, own={404: "No such model."})
_UNLOAD_RESPONSES = _LOAD_RESPONSES | error_responses(
    ErrorBody, own={409: "The configuration keeps this model loaded."}
)


def build_router(service: Service, operations: Operations) -> APIRouter:
    """Return the routes of one service, with the routes of `dead_letters`."""
    router = APIRouter(
        prefix=PREFIX,
        route_class=operator_route_class(render_error, scopes=("admin",)),
        tags=[TAG],
        strict_content_type=False,
    )
    catalog = service.backend.catalog

    def resolve(name: str) -> str:
        try:
            return catalog.find(name).name
        except UnknownModelError as error:
            raise HTTPException(404, error.message) from error

    async def stage_of(name: str) -> str:
        return (await service.backend.status()).get(name, ModelStatus("loading")).stage

    @router.post("/models/{model:path}/load", status_code=202, responses=_LOAD_RESPONSES)
    async def load(model: str) -> KeptModel:
        """Keep one replica of a model loaded until it is unloaded or the server restarts."""
        name = resolve(model)
        await operations.keep(name)
        return KeptModel(model=name, kept=True, stage=await stage_of(name))

    @router.post("/models/{model:path}/unload", responses=_UNLOAD_RESPONSES)
    async def unload(model: str) -> KeptModel:
        """Let a model scale to zero after `downscale_delay_s` without work."""
        name = resolve(model)
        await operations.release(name)
        least = least_replicas(name, service.settings, catalog=catalog)
        if least:
            raise ConflictError(
                f"the configuration keeps {least} of this model: see preload_models and replicas.min_replicas",
                code="kept_by_configuration",
            )
        return KeptModel(model=name, kept=False, stage=await stage_of(name))

    @router.post("/drain", status_code=202, responses=_RESPONSES)
    async def drain() -> Drain:
        """Drain the server: /ready is 503, new work is refused with Retry-After, current work is finished, and waiting
        jobs are left to other servers. /v1/status shows when it is done."""
        await operations.drain()
        return describe_drain((await operations.report()).drain)

    @router.delete("/drain", responses=_RESPONSES)
    async def resume() -> Drain:
        """Accept new work again."""
        await operations.resume()
        return describe_drain((await operations.report()).drain)

    router.include_router(dead_letters.build_router(service))
    return router
