"""The dialect's answers to what goes wrong: `{"error": sentence}`, with `success` false where it is our fault."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stable_audio_serve.api.middleware.observe import note
from stable_audio_serve.api.printable import printable
from stable_audio_serve.api.routing import ExpectedError
from stable_audio_serve.api.service import retry_after_header
from stable_audio_serve.core.errors import StableAudioError

_STATUS = {
    "invalid": 400,
    "unknown_model": 400,
    "invalid_upload": 400,
    "upload_too_large": 413,
    "unauthorized": 401,
    "forbidden": 403,
    "overloaded": 503,
    "quota": 429,
    "unavailable": 503,
    "cancelled": 503,
    "storage": 503,
    "deadline_exceeded": 504,
    "storage_full": 507,
}


class NoRiffsError(StableAudioError):
    """The library has nothing in the key that was asked for; `available_keys` are those it has."""

    kind = "invalid"

    def __init__(self, message: str, *, available_keys: list[str]) -> None:
        super().__init__(message, field="key")
        self.available_keys = available_keys


@dataclass(frozen=True, slots=True)
class Refusal:
    """One error as this dialect says it; `faults` are the fields it is about, in the form of FastAPI's list."""

    status: int
    sentence: str
    headers: Mapping[str, str] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    faults: tuple[Mapping[str, Any], ...] = ()

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        verdict = {"success": False} if self.status >= 500 else {}
        return {**verdict, "error": self.sentence, **self.extra}


def render_error(request: Request, error: ExpectedError) -> Response:
    """The answer to an error we expect."""
    refusal = describe_error(request, error)
    return JSONResponse(refusal.body(), refusal.status, headers=refusal.headers)


def describe_error(request: Request, error: ExpectedError) -> Refusal:
    """What to say of an error we expect, which is also noted in the request's log line."""
    if isinstance(error, RequestValidationError):
        faults = tuple(_fault(fault) for fault in error.errors()[:50])
        note(request.scope, refusal="validation", fields=sorted({str(fault["loc"][-1])[:50] for fault in faults})[:20])
        return Refusal(400, name_field(str(faults[0]["loc"][-1]), faults[0]["msg"]), faults=faults)
    if isinstance(error, HTTPException):
        note(request.scope, refusal=str(error.status_code))
        sentence = str(error.detail)
        if sentence.startswith("audio:"):  # the upload's name in our own dialect
            sentence = f"audio_file:{sentence.removeprefix('audio:')}"
        return Refusal(error.status_code, sentence, headers=error.headers)
    return _describe_typed(request, error)


def _describe_typed(request: Request, error: StableAudioError) -> Refusal:
    note(request.scope, refusal=error.kind)
    status = _STATUS.get(error.kind, 500)
    sentence = name_field(error.field or "", error.message)
    if status == 500:  # what happened inside is for the log, not for the client
        note(request.scope, error=error.message)
        sentence = f"generation failed; request id {request.state.request_id}"
    extra = {"available_keys": error.available_keys} if isinstance(error, NoRiffsError) else {}
    place = ["body", error.field] if error.field else ["body"]
    faults = ({"type": "value_error", "loc": place, "msg": sentence, "input": None},) if status == 400 else ()
    return Refusal(status, sentence, retry_after_header(error), extra, faults)


def name_field(field: str, sentence: str) -> str:
    """`sentence`, with the field it is about in front unless it says so."""
    return sentence if field in sentence else f"{field}: {sentence}"


def _fault(fault: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": fault["type"],
        "loc": [printable(part) for part in fault["loc"]],
        "msg": printable(fault["msg"]),
        "input": printable(fault.get("input")),
    }
