"""What goes wrong, as fal says it: 422 with one entry per field, else a sentence with an error type.

fal's clients repeat 408, 409, 429 and 502-504 on their own. A refusal that may end soon is one of those; the stored
end of a queued request never is, but for a start time-out, which both clients know not to repeat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stable_audio_serve.api.compat.fal.wire import APP, ERROR_TYPE, REQUEST_ID, RETRYABLE, TIMEOUT_TYPE
from stable_audio_serve.api.middleware.observe import note
from stable_audio_serve.api.printable import printable
from stable_audio_serve.api.routing import ExpectedError
from stable_audio_serve.api.service import retry_after_header
from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.jobs.job import Job


@dataclass(frozen=True, slots=True)
class _Kind:
    """How one kind of error is answered: `stored_status` where it is the end of a queued request."""

    status: int
    error_type: str
    is_retryable: bool = False
    stored_status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


_INTERNAL = _Kind(500, "internal_error")
_INTERNAL_MESSAGE = "Internal error: the request could not be completed"
_KINDS = {
    "upload_too_large": _Kind(413, "bad_request"),
    "unauthorized": _Kind(401, "unauthorized"),
    "forbidden": _Kind(403, "forbidden"),
    "cancelled": _Kind(499, "client_cancelled"),
    "start_timeout": _Kind(504, "request_timeout", headers={TIMEOUT_TYPE: "user"}),
    "deadline_exceeded": _Kind(500, "generation_timeout"),
    "overloaded": _Kind(429, "overloaded", is_retryable=True, stored_status=500),
    "quota": _Kind(429, "quota", is_retryable=True, stored_status=500),
    "unavailable": _Kind(503, "unavailable", is_retryable=True, stored_status=500),
    "storage": _Kind(503, "storage", is_retryable=True, stored_status=500),
    "storage_full": _Kind(507, "storage_full", stored_status=500),
}


@dataclass(frozen=True, slots=True)
class Failure:
    """How a request ended that failed or was cancelled."""

    status: int
    body: Mapping[str, Any]
    headers: Mapping[str, str]
    message: str
    error_type: str


def failure_of(job: Job) -> Failure:
    """The end of a job that did not succeed; the same whenever and however it is asked for."""
    if job.state == "cancelled":
        return _failure(_KINDS["cancelled"], "Request was cancelled", is_stored=True)
    if job.error is None:
        return _failure(_INTERNAL, _INTERNAL_MESSAGE, is_stored=True)
    if job.error.code == InvalidRequestError.kind:
        return _invalid([_fault(job.error.message, job.error.field)])
    return _failure(_KINDS.get(job.error.code, _INTERNAL), job.error.message, is_stored=True)


def render_error(request: Request, error: ExpectedError) -> Response:
    """The answer to an error we expect."""
    request_id = getattr(request.state, "fal_request_id", None)
    headers = {REQUEST_ID: request_id} if request_id else {}
    if isinstance(error, HTTPException):
        note(request.scope, refusal=str(error.status_code))
        return JSONResponse({"detail": error.detail}, error.status_code, headers=headers | dict(error.headers or {}))
    if isinstance(error, RequestValidationError):
        failure = _invalid([_entry(request, fault) for fault in error.errors()[:50]])
    elif isinstance(error, InvalidRequestError):
        failure = _invalid([_fault(error.message, error.field)])
    else:
        failure = _failure(_KINDS.get(error.kind, _INTERNAL), error.message, is_stored=False)
        headers |= retry_after_header(error)
        note(request.scope, refusal=error.kind)
        if failure.error_type == _INTERNAL.error_type:
            note(request.scope, error=error.message)  # what happened inside is for the log, not for the client
    if failure.status == 422:
        fields = sorted({str(entry["loc"][-1])[:50] for entry in failure.body["detail"]})
        note(request.scope, refusal="validation", fields=fields[:20])
    return JSONResponse(failure.body, failure.status, headers={**headers, **failure.headers})


def _failure(kind: _Kind, message: str, *, is_stored: bool) -> Failure:
    status = kind.stored_status if is_stored and kind.stored_status else kind.status
    message = _INTERNAL_MESSAGE if kind is _INTERNAL else message
    headers = {ERROR_TYPE: kind.error_type, RETRYABLE: str(kind.is_retryable).lower(), **kind.headers}
    body = {"detail": message, "error_type": kind.error_type}
    return Failure(status, body, headers, message, kind.error_type)


def _invalid(entries: list[dict[str, Any]]) -> Failure:
    message = "; ".join(f"{entry['loc'][-1]}: {entry['msg']}" for entry in entries)
    return Failure(422, {"detail": entries}, {RETRYABLE: "false"}, message, "bad_request")


def _entry(request: Request, fault: Mapping[str, Any]) -> dict[str, Any]:
    loc = tuple(fault["loc"])
    is_empty = loc == ("body",) and fault["type"] == "missing"
    if is_empty and APP in request.url.path:  # clients without an input send no body: name the field
        loc = ("body", "prompt")
    entry = {
        "loc": [printable(part) for part in loc],
        "msg": printable(fault["msg"]),
        "type": fault["type"],
        "input": printable(fault.get("input")),
    }
    if context := fault.get("ctx"):
        entry["ctx"] = printable(context)
    return entry


def _fault(message: str, field_name: str | None) -> dict[str, Any]:
    part = "query" if field_name == "fal_webhook" else "body"
    return {"loc": [part, field_name or "prompt"], "msg": message, "type": "value_error", "input": None}
