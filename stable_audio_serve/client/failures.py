"""Which error of `core.errors` a failed answer or connection is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx

from stable_audio_serve.core import errors

_BY_STATUS: Mapping[int, type[errors.StableAudioError]] = {
    400: errors.InvalidRequestError,
    401: errors.UnauthorizedError,
    403: errors.ForbiddenError,
    404: errors.NotFoundError,
    409: errors.ConflictError,
    413: errors.UploadTooLargeError,
    422: errors.InvalidRequestError,
    429: errors.QuotaError,
    500: errors.GenerationError,
    502: errors.UnreachableError,
    503: errors.OverloadedError,
    504: errors.DeadlineExceededError,
    507: errors.StorageFullError,
}


def _all_below(base: type[errors.StableAudioError]) -> Iterator[type[errors.StableAudioError]]:
    for error in base.__subclasses__():
        yield error
        yield from _all_below(error)


# The first of a kind is the general one.
_BY_KIND = {error.kind: error for error in reversed(list(_all_below(errors.StableAudioError)))}


def read_failure(response: httpx.Response) -> errors.StableAudioError:
    """Returns the error of an answer that is none of success; its content must have been read."""
    kind = _BY_KIND.get(response.headers.get("x-error-kind", ""))
    kind = kind or _BY_STATUS.get(response.status_code, errors.StableAudioError)
    body = _json(response)
    message, field = _read_detail(body.get("detail", body.get("error")))
    message = message or f"the server answered {response.status_code} {response.reason_phrase}".rstrip()
    if issubclass(kind, errors.ConflictError):
        return kind(message, code=str(body.get("code", "conflict")), field=field)
    return kind(message, field=field, retry_after_s=_retry_after(response))


def read_lost_connection(error: httpx.HTTPError) -> errors.StableAudioError:
    """Returns the error of a call that brought no answer."""
    make: Callable[[str], errors.StableAudioError] = errors.UnreachableError
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        make = errors.NotConnectedError
    elif isinstance(error, httpx.TimeoutException):
        make = errors.DeadlineExceededError
    reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
    return make(f"{_server_of(error)} did not answer: {reason}")


def _server_of(error: httpx.HTTPError) -> str:
    """Returns the server that was asked. Never what was asked for, which may be a link that is a secret."""
    try:
        url = error.request.url
    except RuntimeError:
        return "the server"
    return f"the server {url.scheme}://{url.netloc.decode()}"


def _json(response: httpx.Response) -> Mapping[str, Any]:
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _read_detail(detail: Any) -> tuple[str, str | None]:
    """Returns the message and, if one is at fault, the field of a body of our own API, or of the one for loops."""
    if isinstance(detail, dict):  # as the routes answer that are shared with vLLM-Omni
        return str(detail.get("message", "")), detail.get("param")
    if not isinstance(detail, list):
        return str(detail or ""), None
    faults = [fault for fault in detail if isinstance(fault, dict)]
    names = [str(fault.get("loc", [""])[-1]) for fault in faults]
    texts = [f"{name}: {fault.get('msg')}" for name, fault in zip(names, faults, strict=True)]
    return "; ".join(texts), names[0] if names else None


def _retry_after(response: httpx.Response) -> float | None:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() else None
