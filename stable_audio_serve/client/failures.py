"""Convert error responses and lost connections to errors of `core.errors`, and decide whether to send a call again."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from stable_audio_serve.core import errors
from stable_audio_serve.core.errors import StableAudioError

_BY_STATUS: dict[int, type[StableAudioError]] = {
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
# Errors of httpx after which a call may be sent again. DecodingError: the compressed body is damaged.
LOST = (httpx.TransportError, httpx.DecodingError)
_NO_ROUTE = "Not Found"  # the message of Starlette and FastAPI
TEMPORARY = (
    errors.OverloadedError,
    errors.ModelUnavailableError,
    errors.StoppingError,
    errors.StorageError,
    errors.UnreachableError,
)


# The error class for each `kind`. If several classes have the same kind, the first class is the most general one, and
# the dictionary must contain it. A dictionary keeps the last value of a key, so the order is reversed.
_CLASSES = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, StableAudioError)]
_BY_KIND = {error.kind: error for error in reversed(_CLASSES)}


def read_failure(response: httpx.Response) -> StableAudioError:
    """Return the error that an unsuccessful response describes. The response's body must have been read."""
    kind = _BY_KIND.get(response.headers.get("x-error-kind", ""))
    if kind is None and response.status_code == httpx.codes.GATEWAY_TIMEOUT and response.request.method == "GET":
        kind = errors.UnreachableError  # a proxy waited in vain: no GET of the API takes long
    kind = kind or _BY_STATUS.get(response.status_code, StableAudioError)
    try:
        body = response.json()
    except (ValueError, RecursionError):
        body = {}
    body = body if isinstance(body, dict) else {}
    message, field = _read_detail(body.get("detail", body.get("error")))
    if message == _NO_ROUTE:
        message = f"the server has no route {response.request.url.path}; check the server's URL"
    if response.next_request is not None:  # the client follows no redirects: they may lead to another server
        target = response.next_request.url.copy_with(query=None, username=None, password=None)
        message = f"the server redirects to {target}; check the server's URL"
    message = message or f"the server answered {response.status_code} {response.reason_phrase}".rstrip()
    if issubclass(kind, errors.ConflictError):
        return kind(message, code=str(body.get("code", "conflict")), field=field)
    pause = response.headers.get("retry-after", "")
    return kind(message, field=field, retry_after_s=float(pause) if pause.isascii() and pause.isdigit() else None)


def read_lost_connection(error: httpx.HTTPError) -> StableAudioError:
    """Return the error for a call that got no response.

    The message names the server's host only. The whole URL may be a presigned link, which is secret.
    """
    make: Callable[[str], StableAudioError] = errors.UnreachableError
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        make = errors.NotConnectedError
    elif isinstance(error, httpx.TimeoutException):
        make = errors.DeadlineExceededError
    try:
        server = f"the server {error.request.url.scheme}://{error.request.url.netloc.decode()}"
    except RuntimeError:  # `error.request` raises this if it is not set
        server = "the server"
    reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
    return make(f"{server} did not answer: {reason}")


@dataclass(frozen=True, slots=True)
class Retries:
    """How often a failed call is sent again, and how long the pauses are.

    A call is sent again at most `most` times, or `most_refused` times if no connection to the server can be made. All
    pauses together last at most `most_wait_s` seconds. A pause is the response's Retry-After plus a random time. Thus
    clients that failed at the same time do not retry at the same time. Without Retry-After, the first pause is at most
    `first_pause_s` seconds, and this limit doubles with each attempt. `on_pause` is called before each pause with the
    error and the pause in seconds.
    """

    most: int = 5
    most_wait_s: float = 120.0
    first_pause_s: float = 0.5
    most_refused: int | None = None
    on_pause: Callable[[StableAudioError, float], None] | None = None


class Attempts:
    """Counts the failed attempts of one call."""

    def __init__(self, retries: Retries, *, jitter: Callable[[], float] = random.random) -> None:
        self._retries = retries
        self._jitter = jitter
        self._num_failed = 0
        self._waited_s = 0.0

    @property
    def has_retried(self) -> bool:
        """Whether more than one attempt failed. The server may have executed the request in a failed attempt."""
        return self._num_failed > 1

    def pause_s(self, failure: StableAudioError) -> float:
        """Count the attempt that failed with `failure`. Return the seconds to wait before the next attempt.

        Raises `failure` if there must be no next attempt.
        """
        doubling_s = self._retries.first_pause_s * 2.0**self._num_failed
        asked_s = failure.retry_after_s if failure.retry_after_s is not None else doubling_s / 2.0
        pause_s = asked_s + doubling_s / 2.0 * self._jitter()
        self._num_failed += 1
        is_temporary = isinstance(failure, TEMPORARY) and not isinstance(failure, errors.StorageFullError)
        if not is_temporary or self._num_failed > self._most(failure):
            raise failure
        if self._waited_s + pause_s > self._retries.most_wait_s:
            raise failure
        self._waited_s += pause_s
        if self._retries.on_pause is not None:
            self._retries.on_pause(failure, pause_s)
        return pause_s

    def _most(self, failure: StableAudioError) -> int:
        most, refused = self._retries.most, self._retries.most_refused
        return most if refused is None or not isinstance(failure, errors.NotConnectedError) else min(most, refused)


def _read_detail(detail: Any) -> tuple[str, str | None]:
    """Return the message in the `detail` of an error body, and the name of the invalid field if there is one."""
    if isinstance(detail, dict):  # the format of the routes that follow vLLM-Omni's API
        return str(detail.get("message", "")), detail.get("param")
    if not isinstance(detail, list):
        return str(detail or ""), None
    faults = [fault for fault in detail if isinstance(fault, dict)]
    names = [_name_at(fault.get("loc", [""])) for fault in faults]
    found = [(name, str(fault.get("msg"))) for name, fault in zip(names, faults, strict=True)]
    texts = [text if text.startswith(name) else f"{name}: {text}" for name, text in found]
    return "; ".join(texts), names[0] if names else None


def _name_at(place: list[str | int]) -> str:
    """Return a field's name, such as `steps` or `sections.2.duration`, from its location in a validation error."""
    start = place.index("sections") if "sections" in place else -1
    return ".".join(map(str, place[start:]))
