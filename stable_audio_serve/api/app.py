"""Builds the web application: middleware, routers of all dialects, error answers outside any route."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from stable_audio_serve import __version__
from stable_audio_serve.api.backend import Backend
from stable_audio_serve.api.limits import LimitsMiddleware
from stable_audio_serve.api.native.answers import EXPOSED_HEADERS
from stable_audio_serve.api.native.errors import render_error
from stable_audio_serve.api.native.routes import build_router
from stable_audio_serve.api.observe import ObserveMiddleware
from stable_audio_serve.api.service import Service
from stable_audio_serve.core.metrics import Metrics, NullMetrics
from stable_audio_serve.core.settings import Settings


def create_app(backend: Backend, settings: Settings, *, metrics: Metrics | None = None) -> FastAPI:
    """The application over any backend; it knows nothing of Ray."""
    metrics = metrics or NullMetrics()
    service = Service(backend, settings, metrics=metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(
        title="stable-audio-serve",
        version=__version__,
        description="Text to audio, variations and inpainting with Stable Audio models.",
        lifespan=lifespan,
        middleware=[
            Middleware(
                CORSMiddleware,
                allow_origins=settings.api.cors_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=EXPOSED_HEADERS,
            ),
            Middleware(ObserveMiddleware, metrics=metrics),
            Middleware(LimitsMiddleware, limits=settings.api),
        ],
    )
    app.add_exception_handler(HTTPException, render_error)  # type: ignore[arg-type]
    router = build_router(service)
    app.include_router(router)
    app.include_router(router, prefix="/sa3", include_in_schema=False)
    return app
