"""Our dialect's answers to what goes wrong: 422 with FastAPI's list for fields, else `detail` as one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stable_audio_serve.api.middleware.observe import note
from stable_audio_serve.api.printable import printable
from stable_audio_serve.api.routing import ExpectedError
from stable_audio_serve.api.service import retry_after_header
from stable_audio_serve.core.errors import ConflictError, StableAudioError, UnknownModelError

Description = tuple[int, dict[str, Any], Mapping[str, str] | None]  # status, body, headers

_STATUS = {
    "invalid": 400,
    "invalid_upload": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "conflict": 409,
    "upload_too_large": 413,
    "quota": 429,
    "overloaded": 503,
    "unavailable": 503,
    "cancelled": 503,
    "storage": 503,
    "deadline_exceeded": 504,
    "storage_full": 507,
}


def render_error(request: Request, error: ExpectedError) -> Response:
    """The answer to an error we expect."""
    status, body, headers = describe_error(request, error)
    return JSONResponse(body, status, headers=headers)


def describe_error(request: Request, error: ExpectedError) -> Description:
    """What to say of an error we expect, which is also noted in the request's log line."""
    if isinstance(error, RequestValidationError):
        return _describe_fields(request, error.errors())
    if isinstance(error, HTTPException):
        note(request.scope, refusal=str(error.status_code))
        return error.status_code, {"detail": error.detail}, error.headers
    return _describe_typed(request, error)


def _describe_typed(request: Request, error: StableAudioError) -> Description:
    field = error.field
    message = error.message if not field or field in error.message else f"{field}: {error.message}"
    if isinstance(error, UnknownModelError):
        fault = {"type": "value_error", "loc": ("body", field), "msg": message, "input": None}
        return _describe_fields(request, [fault])
    note(request.scope, refusal=error.kind)
    status = _STATUS.get(error.kind, 500)
    if status == 500:  # what happened inside is for the log, not for the client
        note(request.scope, error=error.message)
        message = f"generation failed; request id {request.state.request_id}"
    code = {"code": error.code} if isinstance(error, ConflictError) else {}
    return status, {"detail": message, **code}, retry_after_header(error)


def _describe_fields(request: Request, faults: Sequence[Mapping[str, Any]]) -> Description:
    note(request.scope, refusal="validation", fields=sorted({str(fault["loc"][-1])[:50] for fault in faults})[:20])
    detail = [
        {
            "type": fault["type"],
            "loc": [printable(part) for part in fault["loc"]],
            "msg": printable(_sentence(fault)),
            "input": printable(fault.get("input")),
        }
        for fault in faults[:50]
    ]
    return 422, {"detail": detail}, None


def _sentence(fault: Mapping[str, Any]) -> str:
    """FastAPI says where JSON is broken, and of what is wrong with it nothing."""
    return f"{fault['msg']}: {fault['ctx']['error']}" if fault["type"] == "json_invalid" else fault["msg"]
