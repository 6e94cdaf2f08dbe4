"""Determine from a request's path and headers which of fal's hosts the client means, and build the links for it."""

from __future__ import annotations

import math

from fastapi.exceptions import RequestValidationError
from starlette.convertors import PathConvertor, StringConvertor, register_url_convertor
from starlette.requests import Request

from stable_audio_serve.api.compat.fal.wire import OWNER, Links
from stable_audio_serve.api.links import base_url
from stable_audio_serve.core.generation import Priority
from stable_audio_serve.core.settings import ApiSettings


class AppConvertor(StringConvertor):
    """`{name:fal_app}` in routes matches an application, the first part of an endpoint's id after `fal-ai/`."""

    regex = "stable-audio(?:-3|-25)?"


class WatchedConvertor(StringConvertor):
    """`{name:fal_watched}` in routes matches what stands before `/requests`: an application, or an endpoint's id."""

    regex = f"{AppConvertor.regex}(?:/[a-z0-9-]+)*"


class EndpointConvertor(PathConvertor):
    """`{name:fal_endpoint}` in routes matches a path that accepts submissions. Paths for streaming do not match."""

    regex = "(?!(?:requests|stream|realtime)(?:/|$)).*"


register_url_convertor("fal_app", AppConvertor())
register_url_convertor("fal_watched", WatchedConvertor())
register_url_convertor("fal_endpoint", EndpointConvertor())


def means_queue(request: Request) -> bool:
    """Whether a submission is for the queue, not synchronous.

    The path prefix `/queue` or `/run` decides. Without such a prefix, submissions to a host `queue.*` are queued.
    """
    prefix, _ = _split(request)
    if prefix.endswith(("/queue", "/run")):
        return prefix.endswith("/queue")
    hosts = (request.headers.get("host", ""), request.headers.get("x-forwarded-host", ""))
    return any(host.strip().lower().startswith("queue.") for host in hosts)


def links_of(request: Request, request_id: str, *, limits: ApiSettings) -> Links:
    """Return the three URLs of a queued request: for its status, its result and its cancellation.

    They have the same host and path prefix as the current request, but without `/run`.
    """
    prefix, app = _split(request)
    url = f"{base_url(request, limits)}{prefix.removesuffix('/run')}/{app}/requests/{request_id}"
    return Links(request_id=request_id, response_url=url, status_url=f"{url}/status", cancel_url=f"{url}/cancel")


def start_within_s(request: Request) -> float | None:
    """Return the requested start timeout in seconds, or None. Raises RequestValidationError."""
    text = request.headers.get("x-fal-request-timeout")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise _header_fault("x-fal-request-timeout", text, message="Header should be a number of seconds above 0")
    return seconds


def priority(request: Request) -> Priority:
    """Return the requested priority. Raises RequestValidationError."""
    match text := request.headers.get("x-fal-queue-priority", "normal"):
        case "normal":
            return "interactive"
        case "low":
            return "batch"
    raise _header_fault("x-fal-queue-priority", text, message="Header should be 'normal' or 'low'")


def _split(request: Request) -> tuple[str, str]:
    """Return the part of the path between the server's mount path and the fal application, and the application."""
    path: str = request.scope["path"]
    prefix, _, rest = path.removeprefix(request.scope.get("root_path", "")).partition(f"/{OWNER}/")
    return prefix, f"{OWNER}/{rest.partition('/')[0]}"


def _header_fault(name: str, value: str, *, message: str) -> RequestValidationError:
    return RequestValidationError([{"type": "value_error", "loc": ("header", name), "msg": message, "input": value}])
