"""Convert failed answers and connections to errors of `core.errors`, and decide whether a failed call is repeated."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
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
_TEMPORARY = (
    errors.OverloadedError,
    errors.ModelUnavailableError,
    errors.StoppingError,
    errors.StorageError,
    errors.UnreachableError,
)


def _all_below(base: type[StableAudioError]) -> Iterator[type[StableAudioError]]:
    for error in base.__subclasses__():
        yield error
        yield from _all_below(error)


# Several classes may share a kind. The first one is the most general. `reversed` makes it win, because the dictionary
# keeps the last entry of a key.
_BY_KIND = {error.kind: error for error in reversed(list(_all_below(StableAudioError)))}


def read_failure(response: httpx.Response) -> StableAudioError:
    """Return the error in an unsuccessful answer. Its content must already be read."""
    kind = _BY_KIND.get(response.headers.get("x-error-kind", ""))
    kind = kind or _BY_STATUS.get(response.status_code, StableAudioError)
    try:
        body = response.json()
    except ValueError:
        body = {}
    body = body if isinstance(body, dict) else {}
    message, field = _read_detail(body.get("detail", body.get("error")))
    message = message or f"the server answered {response.status_code} {response.reason_phrase}".rstrip()
    if issubclass(kind, errors.ConflictError):
        return kind(message, code=str(body.get("code", "conflict")), field=field)
    pause = response.headers.get("retry-after", "")
    return kind(message, field=field, retry_after_s=float(pause) if pause.isascii() and pause.isdigit() else None)


def read_lost_connection(error: httpx.HTTPError) -> StableAudioError:
    """Return the error for a call without an answer.

    Its message names the server, but not the whole URL, because that may be a presigned link.
    """
    make: Callable[[str], StableAudioError] = errors.UnreachableError
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        make = errors.NotConnectedError
    elif isinstance(error, httpx.TimeoutException):
        make = errors.DeadlineExceededError
    try:
        server = f"the server {error.request.url.scheme}://{error.request.url.netloc.decode()}"
    except RuntimeError:  # the error has no request
        server = "the server"
    reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
    return make(f"{server} did not answer: {reason}")


@dataclass(frozen=True, slots=True)
class Retries:
    """How often and after which pauses a failed call is repeated.

    At most `most` times, or `most_refused` times if the server refuses connections. All pauses of a call last at most
    `most_wait_s` seconds. A pause is the server's Retry-After plus a random time, so that clients refused at the same
    time do not return at the same time. Without Retry-After, the first pause is at most `first_pause_s` seconds, and
    this limit doubles with each attempt. `on_pause` is called before each pause with the failure and the pause in
    seconds.
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
        """Whether more than one attempt failed. The server may have carried out an earlier attempt all the same."""
        return self._num_failed > 1

    def pause_s(self, failure: StableAudioError) -> float:
        """Return the seconds to wait before the next attempt. Raises `failure` if there is no next attempt."""
        doubling_s = self._retries.first_pause_s * 2.0**self._num_failed
        asked_s = failure.retry_after_s if failure.retry_after_s is not None else doubling_s / 2.0
        pause_s = asked_s + doubling_s / 2.0 * self._jitter()
        self._num_failed += 1
        is_temporary = isinstance(failure, _TEMPORARY) and not isinstance(failure, errors.StorageFullError)
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
    """Return the message in an error body, and the invalid field if the body names one."""
    if isinstance(detail, dict):  # the format of the routes that are shared with vLLM-Omni
        return str(detail.get("message", "")), detail.get("param")
    if not isinstance(detail, list):
        return str(detail or ""), None
    faults = [fault for fault in detail if isinstance(fault, dict)]
    names = [str(fault.get("loc", [""])[-1]) for fault in faults]
    texts = [f"{name}: {fault.get('msg')}" for name, fault in zip(names, faults, strict=True)]
    return "; ".join(texts), names[0] if names else None
