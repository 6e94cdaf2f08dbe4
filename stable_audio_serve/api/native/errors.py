"""Our dialect's answers to what goes wrong: 422 with FastAPI's list for fields, else `detail` as one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stable_audio_serve.api.observe import note
from stable_audio_serve.api.routing import ExpectedError
from stable_audio_serve.api.service import retry_after_header
from stable_audio_serve.core.errors import InvalidRequestError, StableAudioError, UnknownModelError

_STATUS = {
    "invalid": 400,
    "invalid_upload": 400,
    "upload_too_large": 413,
    "overloaded": 503,
    "unavailable": 503,
    "cancelled": 503,
    "deadline_exceeded": 504,
}

# What sampler_kwargs may hold, as the model names it; anything else that only the model can refuse is a 400.
_OPTIONS = frozenset({"sampler_type", "scale_phi", "cfg_norm_threshold"})


def render_error(request: Request, error: ExpectedError) -> Response:
    """The answer to an error we expect."""
    if isinstance(error, RequestValidationError):
        return _render_fields(request, error.errors())
    if isinstance(error, HTTPException):
        note(request.scope, refusal=str(error.status_code))
        return JSONResponse({"detail": error.detail}, error.status_code, headers=error.headers)
    return _render_typed(request, error)


def _render_typed(request: Request, error: StableAudioError) -> Response:
    field = "sampler_kwargs" if error.field in _OPTIONS else error.field
    message = error.message if not field or field in error.message else f"{field}: {error.message}"
    if isinstance(error, UnknownModelError) or (isinstance(error, InvalidRequestError) and error.field in _OPTIONS):
        fault = {"type": "value_error", "loc": ("body", field), "msg": message, "input": None}
        return _render_fields(request, [fault])
    note(request.scope, refusal=error.kind)
    status = _STATUS.get(error.kind, 500)
    if status == 500:  # what happened inside is for the log, not for the client
        note(request.scope, error=error.message)
        message = f"generation failed; request id {request.state.request_id}"
    return JSONResponse({"detail": message}, status, headers=retry_after_header(error.retry_after_s))


def _render_fields(request: Request, faults: Sequence[Mapping[str, Any]]) -> Response:
    note(request.scope, refusal="validation", fields=sorted({str(fault["loc"][-1])[:50] for fault in faults})[:20])
    detail = [
        {
            "type": fault["type"],
            "loc": [_printable(part) for part in fault["loc"]],
            "msg": _printable(fault["msg"]),
            "input": _printable(fault.get("input")),
        }
        for fault in faults[:50]
    ]
    return JSONResponse({"detail": detail}, 422)


def _printable(value: Any, depth: int = 3) -> Any:
    """`value` cut down to what JSON can hold and a reader can use."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**64 else "a very large integer"
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes):
        value = value[:500].decode("utf-8", "replace")
    if isinstance(value, str):
        return value[:500].encode("utf-8", "replace").decode()
    if isinstance(value, Mapping) and depth:
        return {_printable(str(key)): _printable(item, depth - 1) for key, item in list(value.items())[:50]}
    if isinstance(value, list | tuple) and depth:
        return [_printable(item, depth - 1) for item in value[:50]]
    return type(value).__name__
