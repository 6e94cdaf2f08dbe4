"""vLLM's answers to what goes wrong: OpenAI's error object, whose `code` is the HTTP status."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stable_audio_serve.api.middleware.observe import note
from stable_audio_serve.api.printable import printable
from stable_audio_serve.api.routing import ExpectedError
from stable_audio_serve.api.service import retry_after_header
from stable_audio_serve.core.errors import StableAudioError, UnknownModelError

_VALIDATION = "Bad Request"  # found while reading the body; `BadRequestError` is what is refused later
_STATUS_AND_TYPE = {
    "invalid": (400, "BadRequestError"),
    "unauthorized": (401, "AuthenticationError"),
    "forbidden": (403, "PermissionDeniedError"),
    "unknown_model": (404, "NotFoundError"),
    "quota": (429, "RateLimitError"),
    "overloaded": (503, "ServiceUnavailableError"),
    "unavailable": (503, "ServiceUnavailableError"),
    "cancelled": (503, "ServiceUnavailableError"),
    "storage": (503, "ServiceUnavailableError"),
    "deadline_exceeded": (504, "TimeoutError"),
    "storage_full": (507, "InternalServerError"),
}
# What this dialect calls the fields that a model may refuse.
_NAMES = {
    "prompt": "input",
    "duration": "audio_length",
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
}
_NOT_ABOUT_THE_BODY = {405: ("Method Not Allowed", None), 503: ("ServiceUnavailableError", None)}
_INTERNAL = (500, "InternalServerError")


def render_error(request: Request, error: ExpectedError) -> Response:
    """The answer to an error we expect."""
    if isinstance(error, RequestValidationError):
        return _render_fields(request, error)
    if isinstance(error, HTTPException):
        note(request.scope, refusal=str(error.status_code))
        kind, param = _NOT_ABOUT_THE_BODY.get(error.status_code, (_VALIDATION, "body"))
        return _answer(error.status_code, kind, str(error.detail), param=param, headers=error.headers)
    return _render_typed(request, error)


def unknown_model(name: str) -> UnknownModelError:
    """The error for a model that is not served, in vLLM's words."""
    return UnknownModelError(f"The model `{printable(name[:100])}` does not exist.", field="model")


def _render_typed(request: Request, error: StableAudioError) -> Response:
    note(request.scope, refusal=error.kind)
    status, kind = _STATUS_AND_TYPE.get(error.kind, _INTERNAL)
    field, message = error.field, error.message
    if field in _NAMES:
        field, message = _NAMES[field], message.replace(field, _NAMES[field])
    if status == 500:  # what happened inside is for the log, not for the client
        note(request.scope, error=error.message)
        message = f"internal error; request id {request.state.request_id}"
    headers = retry_after_header(error)
    return _answer(status, kind, message, param=field if status < 500 else None, headers=headers)


def _render_fields(request: Request, error: RequestValidationError) -> Response:
    faults = [(_field(fault["loc"]), str(printable(fault["msg"]))) for fault in error.errors()[:50]]
    note(request.scope, refusal="validation", fields=sorted({field for field, _ in faults})[:20])
    message = "; ".join(f"{field}: {text}" for field, text in faults)
    return _answer(400, _VALIDATION, message, param=faults[0][0])


def _field(loc: tuple[int | str, ...]) -> str:
    names = [part for part in loc if isinstance(part, str)]
    return str(printable(names[1] if len(names) > 1 else "body"))


def _answer(
    status: int, kind: str, message: str, *, param: str | None, headers: Mapping[str, str] | None = None
) -> Response:
    body = {"error": {"message": message, "type": kind, "param": param, "code": status}}
    return JSONResponse(body, status, headers=headers)
