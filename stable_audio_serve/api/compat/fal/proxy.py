"""The proxy route of fal's JavaScript client. The client sends every call to one URL, and names
the intended fal URL in a header.

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
