"""Builds the web application: middleware, routers of all dialects, error answers outside any route."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from stable_audio_serve import __version__
from stable_audio_serve.api.answers import EXPOSED_HEADERS
from stable_audio_serve.api.compat import aimlapi, fal
from stable_audio_serve.api.compat.stable_audio_open_small import routes as open_small
from stable_audio_serve.api.compat.vllm_omni import routes as vllm_omni
from stable_audio_serve.api.description import DescribedAPI
from stable_audio_serve.api.middleware.draining import DrainingMiddleware
from stable_audio_serve.api.middleware.limits import ClientTimes, LimitsMiddleware
from stable_audio_serve.api.middleware.observe import ObserveMiddleware
from stable_audio_serve.api.middleware.origins import Origins, OriginsMiddleware
from stable_audio_serve.api.native import job_routes as native_jobs
from stable_audio_serve.api.native import replay
from stable_audio_serve.api.native import routes as native
from stable_audio_serve.api.native.errors import render_error
from stable_audio_serve.api.operator_routes import admin, status
from stable_audio_serve.api.routing import allowed_methods
from stable_audio_serve.api.service import Service
from stable_audio_serve.api.shared_routes import files, merged, pages, server
from stable_audio_serve.api.streams import StreamLimits
from stable_audio_serve.api.unmanaged import UnmanagedOperations
from stable_audio_serve.core.backend import Backend
from stable_audio_serve.core.metrics import Metrics, NullMetrics
from stable_audio_serve.core.operations import Operations
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.jobs.queue import JobQueue

# One for each dialect, in the order of the API page.
TAGS = [
    {"name": native.TAG, "description": "Our own API: the Stable Audio 3 server's."},
    {"name": native_jobs.TAG, "description": "The same requests, accepted now and done later."},
    {"name": server.TAG, "description": "Health and models, shared by all dialects."},
    {"name": files.TAG, "description": "Downloads, for whoever has the link."},
    {"name": merged.TAG, "description": "The path that the dialects of Stable Audio 3 and Open Small share."},
    {"name": open_small.TAG, "description": "The Flask API for Stable Audio Open Small."},
    {"name": vllm_omni.TAG, "description": "vLLM-Omni's audio generation."},
    {"name": aimlapi.TAG, "description": "The AIML API's `stable-audio`: submit and poll."},
    {"name": fal.TAG, "description": "fal's queue, synchronous calls and storage for `fal-ai/stable-audio`."},
    {"name": status.TAG, "description": "The state of the server; with a key that has the scope `admin`, changing it."},
    {"name": pages.TAG, "description": "For browsers: what is served, and this description."},
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
    address_header: str | None = None,
) -> FastAPI:
    """Returns the application over any backend; it knows nothing of Ray.

    Without `jobs` it opens the queue of the settings, whose jobs another process runs. `operations` are what operators
    see and do; by default what a backend of one process can tell. `address_header` is the one in which a proxy before
    this process passes on the client's address, whatever the client sent in it.
    """
    metrics = metrics or NullMetrics()
    service = Service(backend, settings, jobs=jobs, metrics=metrics, stream_limits=stream_limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    origins = Origins(settings.api)
    app = DescribedAPI(
        title=server.NAME,
        version=__version__,
        description="Text to audio, variations and inpainting with Stable Audio models. Each API is also found below a "
        "prefix of its own, where nothing is merged with the others: `/sa3`, `/saos`, `/vllm`, `/aiml`, `/fal`.",
        openapi_tags=TAGS,
        lifespan=lifespan,
        redirect_slashes=False,  # Starlette would redirect to whatever Host the client sent
        openapi_url=None,  # in `pages`, with pages that load nothing from elsewhere
        middleware=[
            Middleware(
                OriginsMiddleware,
                origins=origins,
                exposed_headers=(*EXPOSED_HEADERS, *fal.EXPOSED_HEADERS),
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
    app.state.readiness = service.readiness
    app.state.draining = service.draining  # for the code that stops this process
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
    }
    app.include_router(pages.build_router(service))
    app.include_router(pages.build_api_router())
    app.include_router(server.build_router(service))
    operations = operations or UnmanagedOperations(backend, service.draining)
    app.include_router(status.build_router(service, operations))
    app.include_router(admin.build_router(service, operations))
    app.include_router(merged.build_router(service))
    app.include_router(open_small.build_health_router(service), prefix="/saos")
    for name, router in routers.items():  # where two dialects share a path, the first one's route is found
        app.include_router(router)
        shared = server.build_router(service, owner="vllm" if name == "vllm" else server.NAME)
        for part in (router, shared):
            app.include_router(part, prefix=f"/{name}", include_in_schema=False)
    return app


def _render_unrouted(request: Request, error: HTTPException) -> Response:
    """Answers unknown paths, and unknown methods in the form of the path's dialect."""
    if error.status_code == 405:  # Starlette names the methods of the path's first route only
        error = HTTPException(405, error.detail, headers={"Allow": ", ".join(allowed_methods(request))})
    render = getattr(request.scope.get("route"), "render_error", render_error)
    return render(request, error)
