"""Error responses in fal's format: 422 with one entry per invalid field, otherwise a sentence with an error type.

fal's clients send a request again after the statuses 408, 409, 429 and 502 to 504. A temporary refusal has one of
these statuses. The stored error of a failed queued request has none of them, because asking again would return the same
error. Start timeouts do not follow this rule: their status is 504, but a header tells the client not to retry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stable_audio_serve.api.compat.fal.targets import split_path
from stable_audio_serve.api.compat.fal.wire import (
    APP,
    ERROR_TYPE,
    REQUEST_ID,
    RETRYABLE,
    SA3_APP,
    SA25_APP,
    TIMEOUT_TYPE,
)
from stable_audio_serve.api.printable import printable, printable_fault
from stable_audio_serve.api.refusals import Refusal, Refusals, in_dialect
from stable_audio_serve.core.errors import InvalidRequestError, InvalidUploadError, StableAudioError
from stable_audio_serve.jobs.job import Job

_INTERNAL = (500, "internal_error")
_INTERNAL_MESSAGE = "Internal error: the request could not be completed"
_CANCELLED = (499, "client_cancelled")
_START_TIMEOUT = (504, "request_timeout")
# Status and error type of each kind of error.
_KINDS = {
    "upload_too_large": (413, "bad_request"),
    "unauthorized": (401, "unauthorized"),
    "forbidden": (403, "forbidden"),
    "cancelled": _CANCELLED,
    "start_timeout": _START_TIMEOUT,
    "deadline_exceeded": (500, "generation_timeout"),
    "overloaded": (429, "overloaded"),
    "quota": (429, "quota"),
    "unavailable": (503, "unavailable"),
    "storage": (503, "storage"),
    "storage_full": (507, "storage_full"),
}
# Kinds of the errors that the limits of request bodies raise as HTTPException.
_HTTP_KINDS = {413: "upload_too_large", 503: "unavailable", 507: "storage_full"}
_RETRYABLE = (429, 503)
_TEMPORARY = (*_RETRYABLE, 507)  # statuses that the stored error of a queued request never has; it has 500 instead
# The applications' names for fields of `GenerationRequest` that a model may refuse.
_COMMON_NAMES = {"audio": "audio_url", "steps": "num_inference_steps", "cfg_scale": "guidance_scale"}
_NAMES: Mapping[str, Mapping[str, str]] = {
    APP: {"audio": "audio_url", "duration": "seconds_total"},
    SA3_APP: {**_COMMON_NAMES, "inpaint_start_seconds": "mask_start_seconds"},
    SA25_APP: {
        **_COMMON_NAMES,
        **{"duration": "seconds_total", "init_noise_level": "strength", "inpaint_start_seconds": "mask_start"},
    },
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
        return _failure(_CANCELLED, "Request was cancelled", is_stored=True)
    if job.error is None:
        return _failure(_INTERNAL, _INTERNAL_MESSAGE, is_stored=True)
    if job.error.code in (InvalidRequestError.kind, InvalidUploadError.kind):
        return _invalid([_fault(job.error.message, job.error.field, app=job.spec.wire.get("app", APP))])
    return _failure(_KINDS.get(job.error.code, _INTERNAL), job.error.message, is_stored=True)


def render_failure(request: Request, failure: Failure, *, headers: Mapping[str, str] | None = None) -> Response:
    """Return the response to a failed request, with the id of the request if it has one."""
    request_id = getattr(request.state, "fal_request_id", None)
    own = {REQUEST_ID: request_id} if request_id else {}
    return JSONResponse(failure.body, failure.status, headers={**own, **(headers or {}), **failure.headers})


def _failure(kind: tuple[int, str], message: str, *, is_stored: bool) -> Failure:
    status, error_type = kind
    message = _INTERNAL_MESSAGE if kind == _INTERNAL else message
    headers = {ERROR_TYPE: error_type, RETRYABLE: str(status in _RETRYABLE).lower()}
    if kind == _START_TIMEOUT:
        headers[TIMEOUT_TYPE] = "user"
    body = {"detail": message, "error_type": error_type}
    return Failure(500 if is_stored and status in _TEMPORARY else status, body, headers, message, error_type)


def _invalid(entries: Sequence[dict[str, Any]]) -> Failure:
    named = [(str(entry["loc"][-1]), entry["msg"]) for entry in entries]
    message = "; ".join(text if text.startswith(name) else f"{name}: {text}" for name, text in named)
    return Failure(422, {"detail": list(entries)}, {RETRYABLE: "false"}, message, "bad_request")


def _parse_fault(request: Request, fault: Mapping[str, Any]) -> list[dict[str, Any]]:
    loc = tuple(fault["loc"])
    is_empty = loc == ("body",) and fault["type"] == "missing"
    if is_empty and APP in request.url.path:  # clients send no body if they have no input: report the required field
        loc = ("body", "prompt")
    entry = printable_fault({**fault, "loc": loc}, message=fault["msg"])
    if context := fault.get("ctx"):
        entry["ctx"] = printable(context)
    return [entry]


def _fault(message: str, field_name: str | None, *, app: str) -> dict[str, Any]:
    part = "query" if field_name == "fal_webhook" else "body"
    name, message = in_dialect(field_name or "prompt", message, names=_NAMES.get(app, {}))
    message = message.removeprefix(f"{name}: ")  # the entry names the field already
    return {"loc": [part, name], "msg": message, "type": "value_error", "input": None}


def _find_fault(request: Request, error: StableAudioError) -> dict[str, Any] | None:
    is_input = isinstance(error, InvalidRequestError | InvalidUploadError)
    return _fault(error.message, error.field, app=split_path(request)[1]) if is_input else None


def _answer_http(request: Request, error: HTTPException) -> Response:
    kind = _HTTP_KINDS.get(error.status_code)
    if kind is not None:
        failure = _failure(_KINDS[kind], error.detail, is_stored=False)
        return render_failure(request, failure, headers=error.headers)
    failure = Failure(error.status_code, {"detail": error.detail}, error.headers or {}, error.detail, "")
    return render_failure(request, failure)


def _answer_error(request: Request, refusal: Refusal[tuple[int, str]]) -> Response:
    failure = _failure(refusal.row, refusal.message, is_stored=False)
    return render_failure(request, failure, headers=refusal.headers)


_REFUSALS: Refusals[tuple[int, str], dict[str, Any], Response] = Refusals(
    table=_KINDS,
    internal=_INTERNAL,
    internal_message=_INTERNAL_MESSAGE,
    parse_fault=_parse_fault,
    find_fault=_find_fault,
    name_field=lambda fault: fault["loc"][-1],
    answer_fields=lambda request, faults: render_failure(request, _invalid(faults)),
    answer_http=_answer_http,
    answer_error=_answer_error,
)
render_error = _REFUSALS.answer  # returns the response to an expected error
