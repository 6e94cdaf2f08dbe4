"""Error responses in OpenAI's format: an error object whose `code` is the HTTP status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stable_audio_serve.api.printable import printable
from stable_audio_serve.api.refusals import Refusal, Refusals, field_and_message, name_missing
from stable_audio_serve.core.errors import UnknownModelError

_VALIDATION = "Bad Request"  # the error type of an invalid body; checks after body validation use "BadRequestError"
_STATUS_AND_TYPE = {
    "invalid": (400, "BadRequestError"),
    "unauthorized": (401, "AuthenticationError"),
    "forbidden": (403, "PermissionDeniedError"),
    "unknown_model": (404, "NotFoundError"),
    "not_found": (404, "NotFoundError"),
    "conflict": (409, "ConflictError"),
    "quota": (429, "RateLimitError"),
    "overloaded": (503, "ServiceUnavailableError"),
    "unavailable": (503, "ServiceUnavailableError"),
    "cancelled": (503, "ServiceUnavailableError"),
    "storage": (503, "ServiceUnavailableError"),
    "deadline_exceeded": (504, "TimeoutError"),
    "storage_full": (507, "InternalServerError"),
}
# This dialect's names for fields of `GenerationRequest` that a model may refuse.
_NAMES = {
    "prompt": "input",
    "duration": "audio_length",
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
}
_NOT_ABOUT_THE_BODY = {405: ("Method Not Allowed", None), 503: ("ServiceUnavailableError", None)}


def unknown_model(name: str) -> UnknownModelError:
    """Return the error for a model that is not served, with vLLM's message."""
    return UnknownModelError(f"The model `{printable(name[:100])}` does not exist.", field="model")


def _parse_fault(request: Request, fault: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [parsed for each in name_missing(request, fault) for parsed in field_and_message(request, each)]


def _answer_fields(_: Request, faults: Sequence[tuple[str, str]]) -> Response:
    message = "; ".join(f"{field}: {text}" for field, text in faults)
    return _answer(400, _VALIDATION, message=message, param=faults[0][0])


def _answer_http(_: Request, error: HTTPException) -> Response:
    kind, param = _NOT_ABOUT_THE_BODY.get(error.status_code, (_VALIDATION, "body"))
    return _answer(error.status_code, kind, message=str(error.detail), param=param, headers=error.headers)


def _answer_error(_: Request, refusal: Refusal[tuple[int, str]]) -> Response:
    status, kind = refusal.row
    field, message = refusal.error.field, refusal.message
    if field in _NAMES:
        field, message = _NAMES[field], message.replace(field, _NAMES[field])
    param = field if status < 500 else None
    return _answer(status, kind, message=message, param=param, headers=refusal.headers)


def _answer(
    status: int, kind: str, *, message: str, param: str | None, headers: Mapping[str, str] | None = None
) -> Response:
    body = {"error": {"message": message, "type": kind, "param": param, "code": status}}
    return JSONResponse(body, status, headers=headers)


_REFUSALS: Refusals[tuple[int, str], tuple[str, str], Response] = Refusals(
    table=_STATUS_AND_TYPE,
    internal=(500, "InternalServerError"),
    internal_message="internal error; request id {request_id}",
    parse_fault=_parse_fault,
    name_field=lambda fault: fault[0],
    answer_fields=_answer_fields,
    answer_http=_answer_http,
    answer_error=_answer_error,
)
render_error = _REFUSALS.answer  # returns the response to an expected error
