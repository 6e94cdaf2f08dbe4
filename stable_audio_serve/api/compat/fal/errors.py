"""Error responses in fal's format: 422 with one entry per invalid field, otherwise a sentence with an error type.

fal's clients send a request again after the statuses 408, 409, 429 and 502 to 504. A temporary refusal has one of
these statuses. The stored error of a failed queued request has none of them, because asking again would return the same
error. Start timeouts do not follow this rule: their status is 504, but a header tells the client not to retry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stable_audio_serve.api.compat.fal.wire import APP, ERROR_TYPE, REQUEST_ID, RETRYABLE, TIMEOUT_TYPE
from stable_audio_serve.api.printable import printable
from stable_audio_serve.api.refusals import ExpectedError, Refusal, Refusals
from stable_audio_serve.core.errors import InvalidRequestError, InvalidUploadError, StableAudioError
from stable_audio_serve.jobs.job import Job


@dataclass(frozen=True, slots=True)
class _Kind:
    """The response to one kind of error.

    If a queued request failed with this error, its result has the status `stored_status`, if set, instead of `status`.
    """

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
    """The result of a request that failed or was cancelled."""

    status: int
    body: Mapping[str, Any]
    headers: Mapping[str, str]
    message: str
    error_type: str


def failure_of(job: Job) -> Failure:
    """Return the error to report for a failed or cancelled job, on the result route and in webhooks."""
    if job.state == "cancelled":
        return _failure(_KINDS["cancelled"], "Request was cancelled", is_stored=True)
    if job.error is None:
        return _failure(_INTERNAL, _INTERNAL_MESSAGE, is_stored=True)
    if job.error.code in (InvalidRequestError.kind, InvalidUploadError.kind):
        return _invalid([_fault(job.error.message, job.error.field)])
    return _failure(_KINDS.get(job.error.code, _INTERNAL), job.error.message, is_stored=True)


def render_error(request: Request, error: ExpectedError) -> Response:
    """Return the response to an expected error."""
    return _REFUSALS.answer(request, error)


def _failure(kind: _Kind, message: str, *, is_stored: bool) -> Failure:
    status = kind.stored_status if is_stored and kind.stored_status else kind.status
    message = _INTERNAL_MESSAGE if kind is _INTERNAL else message
    headers = {ERROR_TYPE: kind.error_type, RETRYABLE: str(kind.is_retryable).lower(), **kind.headers}
    body = {"detail": message, "error_type": kind.error_type}
    return Failure(status, body, headers, message, kind.error_type)


def _invalid(entries: Sequence[dict[str, Any]]) -> Failure:
    message = "; ".join(f"{entry['loc'][-1]}: {entry['msg']}" for entry in entries)
    return Failure(422, {"detail": list(entries)}, {RETRYABLE: "false"}, message, "bad_request")


def _parse_fault(request: Request, fault: Mapping[str, Any]) -> list[dict[str, Any]]:
    loc = tuple(fault["loc"])
    is_empty = loc == ("body",) and fault["type"] == "missing"
    if is_empty and APP in request.url.path:  # clients send no body if they have no input: report the required field
        loc = ("body", "prompt")
    entry = {
        "loc": [printable(part) for part in loc],
        "msg": printable(fault["msg"]),
        "type": fault["type"],
        "input": printable(fault.get("input")),
    }
    if context := fault.get("ctx"):
        entry["ctx"] = printable(context)
    return [entry]


def _fault(message: str, field_name: str | None) -> dict[str, Any]:
    part = "query" if field_name == "fal_webhook" else "body"
    return {"loc": [part, field_name or "prompt"], "msg": message, "type": "value_error", "input": None}


def _find_fault(_: Request, error: StableAudioError) -> dict[str, Any] | None:
    is_input = isinstance(error, InvalidRequestError | InvalidUploadError)
    return _fault(error.message, error.field) if is_input else None


def _answer_fields(request: Request, faults: Sequence[dict[str, Any]]) -> Response:
    failure = _invalid(faults)
    return JSONResponse(failure.body, failure.status, headers=_request_header(request) | dict(failure.headers))


def _answer_http(request: Request, error: HTTPException) -> Response:
    headers = _request_header(request) | dict(error.headers or {})
    return JSONResponse({"detail": error.detail}, error.status_code, headers=headers)


def _answer_error(request: Request, refusal: Refusal[_Kind]) -> Response:
    failure = _failure(refusal.row, refusal.message, is_stored=False)
    headers = {**_request_header(request), **refusal.headers, **failure.headers}
    return JSONResponse(failure.body, failure.status, headers=headers)


def _request_header(request: Request) -> dict[str, str]:
    request_id = getattr(request.state, "fal_request_id", None)
    return {REQUEST_ID: request_id} if request_id else {}


_REFUSALS: Refusals[_Kind, dict[str, Any], Response] = Refusals(
    table=_KINDS,
    internal=_INTERNAL,
    internal_message=_INTERNAL_MESSAGE,
    parse_fault=_parse_fault,
    find_fault=_find_fault,
    name_field=lambda fault: fault["loc"][-1],
    answer_fields=_answer_fields,
    answer_http=_answer_http,
    answer_error=_answer_error,
)
