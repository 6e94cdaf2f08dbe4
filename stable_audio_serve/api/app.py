"""Build the web application: middleware, routers of all dialects, and responses to unknown paths."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from stable_audio_serve import __version__
from stable_audio_serve.api.answers import EXPOSED_HEADERS
from stable_audio_serve.api.compat import aimlapi, elevenlabs, fal, stability, vllm_omni
from stable_audio_serve.api.compat.stable_audio_open_small import routes as open_small
from stable_audio_serve.api.description import DescribedAPI
from stable_audio_serve.api.middleware.draining import DrainingMiddleware
from stable_audio_serve.api.middleware.limits import ClientTimes, LimitsMiddleware
from stable_audio_serve.api.middleware.observe import ObserveMiddleware
from stable_audio_serve.api.middleware.origins import Origins, OriginsMiddleware
from stable_audio_serve.api.native import job_routes as native_jobs
from stable_audio_serve.api.native import replay
from stable_audio_serve.api.native import routes as native
from stable_audio_serve.api.native.errors import render_error
from stable_audio_serve.api.operator_routes import adapters as adapter_routes
from stable_audio_serve.api.operator_routes import admin, status
from stable_audio_serve.api.routing import allowed_methods
from stable_audio_serve.api.service import Service
from stable_audio_serve.api.shared_routes import files, merged, pages, server
from stable_audio_serve.api.streams import StreamLimits
from stable_audio_serve.api.unmanaged import UnmanagedOperations
from stable_audio_serve.core.adapters import AdapterLibrary, NoAdapters
from stable_audio_serve.core.backend import Backend
from stable_audio_serve.core.metrics import Metrics, NullMetrics
from stable_audio_serve.core.operations import Operations
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.jobs.queue import JobQueue

# OpenAPI tags, in the order in which the API page lists them.
TAGS = [
    {"name": native.TAG, "description": "The native API: the contract of the Stable Audio 3 server."},
    {"name": native_jobs.TAG, "description": "The same requests as background jobs."},
    {"name": server.TAG, "description": "Health and models, shared by all dialects."},
    {"name": files.TAG, "description": "Downloads for anyone with the link."},
    {"name": merged.TAG, "description": "The path that Stable Audio 3 and Open Small share."},
    {"name": open_small.TAG, "description": "The Flask API for Stable Audio Open Small."},
    {"name": vllm_omni.TAG, "description": "vLLM-Omni's audio generation."},
    {"name": aimlapi.TAG, "description": "The AIML API's `stable-audio`: submit and poll."},
    {"name": fal.TAG, "description": "fal's queue, synchronous calls and storage for `fal-ai/stable-audio`."},
    {"name": elevenlabs.TAG, "description": "ElevenLabs' sound effects and music."},
    {"name": stability.TAG, "description": "Stability AI's REST API for Stable Audio 3, 2.5 and 2."},
    {"name": status.TAG, "description": "Server state and operator actions; a key needs the scope `admin`."},
    {"name": pages.TAG, "description": "Pages for browsers: the playground and this description."},
]


def create_app(
    backend: Backend,
    settings: Settings,
    *,
    jobs: JobQueue | None = None,
    metrics: Metrics | None = None,
    stream_limits: StreamLimits | None = None,
    client_times: ClientTimes | None = None,
    operations: Operations | None = None,
    adapters: AdapterLibrary = NoAdapters(),
    address_header: str | None = None,
) -> FastAPI:
    """Return the application. `backend` may run models with or without Ray.

    Without `jobs`, the application opens the job queue that the settings name. The application only adds jobs to the
    queue; another process runs them. Without `operations`, the operator routes describe this process only. Without
    `adapters`, no model has adapters. `address_header` is the header in which a proxy sends the client's address. The
    proxy must overwrite a value that the client sent.
    """
    metrics = metrics or NullMetrics()
    service = Service(backend, settings, jobs=jobs, metrics=metrics, stream_limits=stream_limits, adapters=adapters)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    origins = Origins(settings.api)
    app = DescribedAPI(
        title=server.NAME,
        version=__version__,
        description="Text to audio, variations and inpainting with Stable Audio models. Each dialect is also available "
        "separately below its own prefix: `/sa3`, `/saos`, `/vllm`, `/aiml`, `/fal`, `/stability`, `/elevenlabs`.",
        openapi_tags=TAGS,
        lifespan=lifespan,
        redirect_slashes=False,  # Starlette would redirect to any Host that the client sends
        openapi_url=None,  # `shared_routes.pages` serves the API description
        middleware=[
            Middleware(
                OriginsMiddleware,
                origins=origins,
                exposed_headers=(*EXPOSED_HEADERS, *fal.EXPOSED_HEADERS, *stability.EXPOSED_HEADERS),
            ),
            Middleware(DrainingMiddleware, draining=service.draining),
            Middleware(ObserveMiddleware, metrics=metrics),
            Middleware(LimitsMiddleware, limits=settings.api, times=client_times),
        ],
    )
    app.add_exception_handler(HTTPException, _render_unrouted)  # type: ignore[arg-type]
    app.state.keys = service.keys
    app.state.address_header = address_header
    app.state.limiter = service.limiter
    app.state.origins = origins
    app.state.draining = service.draining  # read by the code that stops this process
    _include_routes(app, service, operations=operations or UnmanagedOperations(backend, service.draining))
    return app


def _include_routes(app: FastAPI, service: Service, *, operations: Operations) -> None:
    """Add all routes. If two of them have the same path, the first one handles it."""
    sa3 = APIRouter()
    sa3.include_router(native.build_router(service))
    sa3.include_router(replay.build_router(service))
    sa3.include_router(native_jobs.build_router(service))
    sa3.include_router(files.build_router(service))
    routers = {
        "sa3": sa3,
        "saos": open_small.build_router(service),
        "vllm": vllm_omni.build_router(service),
        "aiml": aimlapi.build_router(service),
        "fal": fal.build_router(service),
        "stability": stability.build_router(service),
        "elevenlabs": elevenlabs.build_router(service),
    }
    app.include_router(pages.build_router(service))
    app.include_router(pages.build_api_router(service))
    app.include_router(server.build_router(service))
    app.include_router(status.build_router(service, operations))
    app.include_router(admin.build_router(service, operations))
    app.include_router(adapter_routes.build_router(service))
    app.include_router(merged.build_router(service))
    app.include_router(open_small.build_health_router(service), prefix="/saos")
    for router in routers.values():  # before the prefixes, because routes are tried in this order
        app.include_router(router)
    for name, router in routers.items():
        shared = server.build_router(service, dialect=name)
        for part in (router, shared):
            app.include_router(part, prefix=f"/{name}", include_in_schema=False)


def _render_unrouted(request: Request, error: HTTPException) -> Response:
    """Return the response to an unknown path, or to a method that a known path does not support.

    For a known path the error has the format of the dialect (API) that the path belongs to. The mount path without its
    trailing slash leads to the playground.
    """
    if (root_path := request.scope.get("root_path")) == request.scope["path"]:
        return RedirectResponse(f"{root_path}/")
    if error.status_code == 405:  # Starlette's Allow header has the methods of the path's first route only
        error = HTTPException(405, error.detail, headers={"Allow": ", ".join(allowed_methods(request))})
    render = getattr(request.scope.get("route"), "render_error", render_error)
    return render(request, error)
