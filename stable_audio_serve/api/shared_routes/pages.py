"""Pages for browsers: the playground at the root, and two pages with the API description.

The pages load nothing from other hosts. Scripts and styles come from the folder `playground` and the package
`fastapi-offline`. The Content-Security-Policy of each page allows only what the page needs.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response

from stable_audio_serve import __version__
from stable_audio_serve.api.description import error_responses
from stable_audio_serve.api.links import base_url
from stable_audio_serve.api.native.errors import render_error
from stable_audio_serve.api.native.schemas import ErrorBody
from stable_audio_serve.api.routing import public_route_class
from stable_audio_serve.api.service import Service
from stable_audio_serve.api.shared_routes import info
from stable_audio_serve.api.shared_routes.server import NAME
from stable_audio_serve.core.catalog import ModelCatalog

TAG = "Pages"

_FOR_PEOPLE = {"Pages", "Operators"}  # a program can generate audio without operations that have these tags
_REDOC = "redoc.standalone.js"
_REDOC_LOGO = b"https://cdn.redoc.ly/redoc/logo-mini.svg"
_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    _REDOC: "text/javascript",
    "favicon.png": "image/png",
}
# Scripts need a nonce, because 'self' would also allow scripts in uploaded files, which this server returns too.
_HOME_POLICY = (
    "default-src 'self'; script-src 'nonce-{nonce}'; worker-src 'none'; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
# The pages of Swagger UI and ReDoc set styles by script. Swagger UI plays audio responses. ReDoc searches in a worker
# created from a blob.
_API_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self' data:; connect-src 'self'; media-src 'self' blob:; worker-src blob:; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
_PLAYGROUND = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
_HTML: dict[int | str, dict[str, Any]] = {200: {"description": "A page.", "content": {"text/html": {}}}}
_API_RESPONSES: dict[int | str, dict[str, Any]] = {**_HTML, **error_responses(ErrorBody, 500)}

_CARD_PATHS = {
    "docs": "/docs",
    "redoc": "/redoc",
    "openapi": "/openapi.json",
    "llms": "/llms.txt",
    "models": "/v1/models",
    "health": "/health",
    "ready": "/ready",
}
_DIALECTS = {
    "sa3": ("Stable Audio 3 server", "", "/sa3"),
    "saos": ("Stable Audio Open Small API", "", "/saos"),
    "vllm": ("vLLM-Omni", "/v1", "/vllm/v1"),
    "aiml": ("AIML API", "/v2", "/aiml/v2"),
    "fal": ("fal", "", "/fal"),
    "stability": ("Stability", "", "/stability"),
    "elevenlabs": ("ElevenLabs", "", "/elevenlabs"),
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str


class ServedModel(BaseModel):
    """Summary of a served model."""

    name: str
    description: str
    is_default: bool
    max_duration_s: float


class Dialect(BaseModel):
    """One of the supported APIs."""

    name: str
    base_url: str = Field(description="Base URL for clients of this API; a path that two dialects share is merged.")
    own_base_url: str = Field(description="Base URL of this dialect alone.")


class Card(BaseModel):
    """The served models and dialects."""

    name: Literal["stable-audio-serve"] = NAME
    version: str = __version__
    status: str = Field(description="As in /ready.")
    ready: bool
    needs_key: bool = Field(description="Whether requests need `Authorization: Bearer <key>`.")
    models: list[ServedModel]
    dialects: dict[str, Dialect]
    links: dict[str, str]


def build_router(service: Service) -> APIRouter:
    """Return the playground routes. They need no API key, because they reveal less than the public route /health."""
    router = APIRouter(route_class=public_route_class(render_error), tags=[TAG])
    playground = _read_playground()
    responses: dict[int | str, dict[str, Any]] = {
        200: {
            "model": Card,
            "description": "JSON for `Accept: application/json`, otherwise a page.",
            "content": {"text/html": {}},
        }
    }

    @router.head("/", include_in_schema=False)
    @router.get("/", summary="Show what is served", response_class=Response, responses=responses)
    async def home(request: Request) -> Response:
        """Return the playground, or for clients that accept only JSON a summary of the server."""
        accepted = request.headers.get("accept", "")
        if "application/json" in accepted and "text/html" not in accepted:
            card = await _describe(service, request)
            return JSONResponse(card.model_dump(), headers={"Vary": "Accept"})
        nonce = secrets.token_urlsafe(16)
        policy = {"Content-Security-Policy": _HOME_POLICY.format(nonce=nonce)}
        page = playground["index.html"].content.decode().replace("{nonce}", nonce)
        return HTMLResponse(page, headers={**_HEADERS, **policy, "Vary": "Accept", "Cache-Control": "no-store"})

    @router.get(
        "/playground/{path:path}",
        summary="Load a playground file",
        response_class=Response,
        responses={
            200: {"description": "A script, a style or an image.", "content": {"application/octet-stream": {}}},
            304: {"description": "Not modified."},
            404: {"model": ErrorBody, "description": "No such file."},
        },
    )
    async def part(request: Request, path: str) -> Response:
        """Return a file of the playground."""
        found = playground.get(path)
        if found is None or path == "index.html":
            raise HTTPException(404, "file not found")
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache", "ETag": found.etag}
        if request.headers.get("if-none-match") == found.etag:
            return Response(status_code=304, headers=headers)
        return Response(found.content, media_type=found.media_type, headers=headers)

    return router


def build_api_router(service: Service) -> APIRouter:
    """Return the routes of the API description and its pages. They need no key."""
    router = APIRouter(route_class=public_route_class(render_error), tags=[TAG])

    @router.get("/openapi.json", summary="Describe the API", responses=error_responses(ErrorBody, 500))
    async def openapi(request: Request) -> dict[str, Any]:
        """Return the OpenAPI description of this server."""
        document: dict[str, Any] = request.app.openapi()
        prefix = urlsplit(base_url(request, service.settings.api)).path
        return document | {"servers": [{"url": prefix}]} if prefix else document

    @router.get(
        "/llms.txt",
        summary="Describe the API to language models",
        response_class=PlainTextResponse,
        responses=error_responses(ErrorBody, 500),
    )
    async def text(request: Request) -> str:
        """Return a short description of the models and operations as Markdown."""
        base = base_url(request, service.settings.api)
        return _describe_in_markdown(request.app.openapi(), service.backend.catalog, base=base)

    @router.get("/docs", summary="Try the API out", response_class=HTMLResponse, responses=_API_RESPONSES)
    async def swagger(request: Request) -> Response:
        """Show the interactive API page."""
        page = get_swagger_ui_html(
            openapi_url="openapi.json",
            title=request.app.title,
            swagger_js_url="docs/assets/swagger-ui-bundle.js",
            swagger_css_url="docs/assets/swagger-ui.css",
            swagger_favicon_url="docs/assets/favicon.png",
        )
        return _with_policy(page)

    @router.get("/redoc", summary="Read the API's description", response_class=HTMLResponse, responses=_API_RESPONSES)
    async def redoc(request: Request) -> Response:
        """Show the API description as one page."""
        page = get_redoc_html(
            openapi_url="openapi.json",
            title=request.app.title,
            redoc_js_url="docs/assets/redoc.standalone.js",
            redoc_favicon_url="docs/assets/favicon.png",
            with_google_fonts=False,
        )
        return _with_policy(page)

    @router.get(
        "/docs/assets/{file_name}",
        summary="Load a file of these pages",
        response_class=Response,
        responses={
            200: {"description": "A script, a style or an image.", "content": {"application/octet-stream": {}}},
            **error_responses(ErrorBody, 500, own={404: "No such file."}),
        },
    )
    async def asset(file_name: str) -> Response:
        """Return a script, style or image of the pages /docs and /redoc."""
        if file_name not in _ASSETS:
            raise HTTPException(404, "file not found")
        path = Path(str(files("fastapi_offline") / "static" / file_name))
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "max-age=3600"}
        if file_name == _REDOC:
            return Response(await asyncio.to_thread(_read_redoc, path), media_type=_ASSETS[_REDOC], headers=headers)
        return FileResponse(path, media_type=_ASSETS[file_name], headers=headers)

    return router


def _read_playground() -> dict[str, _File]:
    """Read the playground's files, about 100 kB. Returns them by their relative paths."""
    folder = Path(__file__).parents[1] / "playground"
    found = {}
    for path in folder.rglob("*"):
        if path.suffix in {".html", *_PLAYGROUND}:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            media_type = _PLAYGROUND.get(path.suffix, "text/html")
            found[path.relative_to(folder).as_posix()] = _File(content, media_type, etag)
    return found


@cache
def _read_redoc(path: Path) -> bytes:
    """Return ReDoc's script without the logo, which it would load from another host."""
    return path.read_bytes().replace(_REDOC_LOGO, b"data:,")


def _with_policy(page: HTMLResponse) -> HTMLResponse:
    """Return the page with a Content-Security-Policy that allows only the scripts in the page."""
    nonce = secrets.token_urlsafe(16)
    text = bytes(page.body).decode().replace("<script", f'<script nonce="{nonce}"')
    return HTMLResponse(text, headers={**_HEADERS, "Content-Security-Policy": _API_POLICY.format(nonce=nonce)})


async def _describe(service: Service, request: Request) -> Card:
    catalog, base = service.backend.catalog, base_url(request, service.settings.api)
    ready = info.describe_ready(service, await service.backend.status(), job_store=await service.jobs.watch.health())
    return Card(
        status=ready.status,
        ready=ready.ready,
        needs_key=service.settings.api.has_keys,
        models=[
            ServedModel(
                name=card.name,
                description=card.description,
                is_default=card.name == catalog.default.name,
                max_duration_s=card.max_duration_s,
            )
            for card in catalog
        ],
        dialects={
            key: Dialect(name=name, base_url=base + merged, own_base_url=base + own)
            for key, (name, merged, own) in _DIALECTS.items()
        },
        links={name: base + path for name, path in _CARD_PATHS.items()},
    )


def _describe_in_markdown(document: Mapping[str, Any], catalog: ModelCatalog, *, base: str) -> str:
    """Return Markdown that names the models and links each operation of the OpenAPI description `document`, in the form
    of llms.txt (https://llmstxt.org).

    `base` is the server's URL.
    """
    lines = [f"# {document['info']['title']}", "", f"> {document['info']['description']}", ""]
    names = ", ".join(f"`{card.name}` (up to {card.max_duration_s:g} s)" for card in catalog)
    lines += [
        f"Models: {names}. The default is `{catalog.default.name}`. Clients need a key only if the server has keys."
    ]
    for tag in document["tags"]:
        if tag["name"] in _FOR_PEOPLE:
            continue
        lines += ["", f"## {tag['name']}", "", tag["description"], ""]
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if tag["name"] in operation["tags"]:
                    link = f"{base}/docs#/{tag['name']}/{operation['operationId']}".replace(" ", "%20")
                    text = str(operation.get("description", operation["summary"])).partition("\n")[0]
                    lines.append(f"- [{method.upper()} {path}]({link}): {text}")
    lines += ["", "## Optional", "", f"- [OpenAPI]({base}/openapi.json): every field, range and error", ""]
    return "\n".join(lines)
