"""Absolute URLs in responses. They begin with the configured public URL, or else with the host of the request.

Clients can forge the headers with host and scheme, so only plain host names and HTTP schemes are accepted.
"""

from __future__ import annotations

import re
from urllib.parse import quote

from starlette.requests import Request

from stable_audio_serve.core.settings import ApiSettings
from stable_audio_serve.jobs.job import JobResult

_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252})|\[[0-9A-Fa-f:.]{2,45}\])(?::\d{1,5})?")


def base_url(request: Request, limits: ApiSettings) -> str:
    """Return the URL of this server for the caller: scheme, host and mount path, without a trailing slash."""
    if limits.public_url:
        return limits.public_url.rstrip("/")
    forwarded_scheme = _first(request, "x-forwarded-proto").lower()
    scheme = forwarded_scheme if forwarded_scheme in ("http", "https") else request.url.scheme
    hosts = (_first(request, "x-forwarded-host"), _first(request, "host"))
    host = next((host for host in hosts if _HOST.fullmatch(host)), None) or _own_address(request)
    return f"{scheme}://{host}{request.scope.get('root_path', '').rstrip('/')}"


def file_url(base: str, result: JobResult) -> str:
    """Return the link to a finished job's file. The link works without an API key."""
    return published_url(base, result.file_id, file_name=result.file.file_name)


def published_url(base: str, file_id: str, *, file_name: str) -> str:
    """Return the link to a file published with this id (`JobQueue.publish`). The link works without an API key."""
    return f"{base}/files/{file_id}/{quote(file_name, safe='')}"


def _first(request: Request, header: str) -> str:
    """Return the first of a header's comma-separated values. The proxy nearest to the client set the first value."""
    return request.headers.get(header, "").split(",")[0].strip()


def _own_address(request: Request) -> str:
    host, port = request.scope.get("server") or ("localhost", None)
    host = f"[{host}]" if ":" in host else host
    return f"{host}:{port}" if port else host
