"""Determine which of fal's hosts the client of a request means, and build the URLs of a queued request.

fal's JavaScript client can send every call to one URL, the proxy route, and name the intended fal URL in a header.
Nothing is sent to fal: this server's own routes answer the calls to fal's three hosts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from urllib.parse import unquote, urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from stable_audio_serve.api.compat.fal.wire import OWNER, Links
from stable_audio_serve.api.links import base_url
from stable_audio_serve.api.routing import register_pattern
from stable_audio_serve.core.settings import ApiSettings

TARGET_HEADER = "x-fal-target-url"

# For each host of fal: the path prefix of this server's routes that answer calls to that host.
_PREFIXES: Mapping[str, str] = {"fal.run": "/run", "queue.fal.run": "/queue", "rest.fal.ai": ""}

# The description of the header in OpenAPI.
TARGET_PARAMETER = {
    "name": TARGET_HEADER,
    "in": "header",
    "required": True,
    "description": "Intended fal URL, for example https://fal.run/fal-ai/stable-audio. This server responds itself.",
    "schema": {"type": "string", "pattern": f"^https?://({'|'.join(map(re.escape, _PREFIXES))})/[!-~]*$"},
}


_APP = "stable-audio(?:-3|-25)?"  # an application: the first part of an endpoint's id after `fal-ai/`
WATCHED = f"{_APP}(?:/[a-z0-9-]+)*"  # what stands before `/requests`: an application, or an endpoint's id
register_pattern("fal_app", _APP)
register_pattern("fal_watched", WATCHED)
register_pattern("fal_endpoint", "(?!(?:requests|stream|realtime)(?:/|$)).*")  # what accepts submissions


def means_queue(request: Request) -> bool:
    """Whether a submission is for the queue, not synchronous.

    The path prefix `/queue` or `/run` decides. Without such a prefix, submissions to a host `queue.*` are queued.
    """
    prefix, _ = split_path(request)
    if prefix.endswith(("/queue", "/run")):
        return prefix.endswith("/queue")
    hosts = (request.headers.get("host", ""), request.headers.get("x-forwarded-host", ""))
    return any(host.strip().lower().startswith("queue.") for host in hosts)


def links_of(request: Request, request_id: str, *, limits: ApiSettings) -> Links:
    """Return the three URLs of a queued request: for its status, its result and its cancellation.

    They have the same host and path prefix as the current request, but without `/run`.
    """
    prefix, app = split_path(request)
    url = f"{base_url(request, limits)}{prefix.removesuffix('/run')}/{app}/requests/{request_id}"
    return Links(request_id=request_id, response_url=url, status_url=f"{url}/status", cancel_url=f"{url}/cancel")


class Dispatched(Response):
    """Sends the response of another route of this server unchanged. The response may be a stream."""

    def __init__(self, app: ASGIApp, *, path: str, query: bytes) -> None:
        super().__init__()
        self._app, self._path, self._query = app, path, query

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: PLR0917 - ASGI's signature
        root_path = scope.get("root_path", "")
        path = root_path + self._path
        target = {"path": path, "raw_path": path.encode(), "query_string": self._query}
        await self._app({**scope, **target}, receive, send)


def dispatch(request: Request, app: ASGIApp) -> Response:
    """Return the response of this server's route for the fal URL in the request's header.

    Raises HTTPException 400 if the header is missing, and 412 for a host other than fal's.
    """
    target = request.headers.get(TARGET_HEADER)
    if target is None:
        raise HTTPException(400, f"{TARGET_HEADER}: set this header to the fal URL of the call")
    prefix = None
    with suppress(ValueError):  # an invalid URL is refused below, like an unknown host
        url = urlsplit(target)
        if url.scheme in ("http", "https"):
            prefix = _PREFIXES.get(url.netloc.lower())
    if prefix is None:
        raise HTTPException(412, f"{TARGET_HEADER}: must be a URL of one of the hosts {', '.join(_PREFIXES)}")
    return Dispatched(app, path=prefix + unquote(url.path), query=url.query.encode())


def split_path(request: Request) -> tuple[str, str]:
    """Return the part of the path between the server's mount path and the fal application, and the application."""
    path: str = request.scope["path"]
    prefix, _, rest = path.removeprefix(request.scope.get("root_path", "")).partition(f"/{OWNER}/")
    return prefix, f"{OWNER}/{rest.partition('/')[0]}"
