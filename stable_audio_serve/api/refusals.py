"""Error handling shared by all dialects: classify an expected error, log it, and hide internal messages.

Each dialect provides a table with a row for each kind of error (for example its status), and functions that build its
responses. `middleware.observe` turns unexpected exceptions into a GenerationError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from stable_audio_serve.api.middleware.observe import note
from stable_audio_serve.api.printable import printable
from stable_audio_serve.core.errors import StableAudioError, StorageError

ExpectedError = StableAudioError | RequestValidationError | HTTPException
EXPECTED_ERRORS = (StableAudioError, RequestValidationError, HTTPException)

Row = TypeVar("Row")
Fault = TypeVar("Fault")
Answer = TypeVar("Answer")

# The HTTP status of each kind of error that clients may see. Dialects change single rows.
STATUS: Mapping[str, int] = {
    "invalid": 400,
    "unknown_model": 400,
    "invalid_upload": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "upload_too_large": 413,
    "quota": 429,
    "overloaded": 503,
    "unavailable": 503,
    "cancelled": 503,
    "storage": 503,
    "deadline_exceeded": 504,
    "storage_full": 507,
}

MAX_FAULTS = 50
_MAX_NOTED_FIELDS = 20
_STORAGE_RETRY_S = 5.0


@dataclass(frozen=True, slots=True)
class Refusal(Generic[Row]):
    """An error of `core.errors`, and the row for this kind of error in the dialect's table.

    `message` is safe to show to the client.
    """

    error: StableAudioError
    row: Row
    message: str
    headers: Mapping[str, str]
    is_internal: bool


def to_fault(field: str | tuple[str | int, ...], message: str, *, value: object = None) -> dict[str, Any]:
    """Return an entry about an invalid field of the body, as in FastAPI's list of invalid fields."""
    place = (field,) if isinstance(field, str) else field
    return {"type": "value_error", "loc": ("body", *place), "msg": message, "input": value}


def invalid(field: str, message: str, *, value: object = None, place: str = "body") -> RequestValidationError:
    """Return the error that FastAPI raises for an invalid field. `place` is the part of the request that has it."""
    return RequestValidationError([to_fault(field, message, value=value) | {"loc": (place, field)}])


def invalid_body(error: ValidationError) -> RequestValidationError:
    """Return the error that FastAPI raises for a body that a Pydantic model does not accept."""
    faults = error.errors(include_url=False)
    return RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in faults])


def field_and_message(_: Request, fault: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the field name and the message of one entry of FastAPI's list of invalid fields."""
    names = [part for part in fault["loc"] if isinstance(part, str)]
    return [(str(printable(names[1] if len(names) > 1 else "body")), str(printable(fault["msg"])))]


def in_dialect(field: str, message: str, *, names: Mapping[str, str]) -> tuple[str, str]:
    """Return the dialect's name of a field, and the message with this name. `names` has the names that differ."""
    name = names.get(field, field)
    if message.startswith((f"{field} ", f"{field}:")):
        return name, name + message.removeprefix(field)
    return name, message if name in message else f"{name}: {message}"


def name_missing(request: Request, fault: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return one entry of FastAPI's list of invalid fields. If the body is missing, return one for each required field.

    FastAPI reports a missing body as one fault without a field.
    """
    if fault["type"] == "missing" and tuple(fault["loc"]) == ("body",):
        body = getattr(request.scope.get("route"), "body_field", None)
        fields = getattr(body.field_info.annotation, "model_fields", {}) if body else {}
        required = [name for name, field in fields.items() if field.is_required()]
        return [{**fault, "loc": ("body", name)} for name in required] or [fault]
    return [fault]


def _in_words_of_clients(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replace FastAPI's message about text sent instead of a file, because that message names Python classes."""
    return {**entry, "msg": "must be an uploaded file"} if "UploadFile" in entry["msg"] else entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusals(Generic[Row, Fault, Answer]):
    """Error handling of one dialect."""

    table: Mapping[str, Row]
    """Row of each kind of error that clients may see."""
    internal: Row
    """Row of all other kinds. Their messages are only logged, and clients get `internal_message`."""
    internal_message: str
    """May contain `{request_id}`."""
    parse_fault: Callable[[Request, Mapping[str, Any]], Sequence[Fault]]
    """Converts an entry of FastAPI's list of invalid fields to the faults that the dialect reports."""
    find_fault: Callable[[Request, StableAudioError], Fault | None] = lambda *_: None
    """Returns the invalid field of an error that the dialect reports like an invalid field, else None."""
    name_field: Callable[[Fault], Any]
    answer_fields: Callable[[Request, Sequence[Fault]], Answer]
    answer_http: Callable[[Request, HTTPException], Answer]
    answer_error: Callable[[Request, Refusal[Row]], Answer]

    def answer(self, request: Request, error: ExpectedError) -> Answer:
        """Return the dialect's response to an expected error, and add the refusal to the request's log line."""
        if isinstance(error, RequestValidationError):
            entries = map(_in_words_of_clients, error.errors()[:MAX_FAULTS])
            faults = [fault for entry in entries for fault in self.parse_fault(request, entry)]
            return self._refuse_fields(request, faults)
        if isinstance(error, HTTPException):
            note(request.scope, refusal=str(error.status_code))
            return self.answer_http(request, error)
        fault = self.find_fault(request, error)
        if fault is not None:
            return self._refuse_fields(request, [fault])
        return self.answer_error(request, self._look_up(request, error))

    def _refuse_fields(self, request: Request, faults: Sequence[Fault]) -> Answer:
        fields = sorted({str(self.name_field(fault))[:50] for fault in faults})
        note(request.scope, refusal="validation", fields=fields[:_MAX_NOTED_FIELDS])
        return self.answer_fields(request, faults)

    def _look_up(self, request: Request, error: StableAudioError) -> Refusal[Row]:
        note(request.scope, refusal=error.kind)
        is_internal = error.kind not in self.table
        message = error.message
        if is_internal or isinstance(error, StorageError):
            note(request.scope, error=message)
        if is_internal:
            message = self.internal_message.format(request_id=request.state.request_id)
        row = self.table.get(error.kind, self.internal)
        return Refusal(error, row, message, _retry_after(error), is_internal)


def _retry_after(error: StableAudioError) -> dict[str, str]:
    """Return the `Retry-After` header (whole seconds, at least 1), or {} if it is unknown when to retry."""
    seconds = error.retry_after_s
    if seconds is None and error.kind == StorageError.kind:  # the store cannot predict when it recovers
        seconds = _STORAGE_RETRY_S
    return {} if seconds is None else {"Retry-After": str(max(1, math.ceil(seconds)))}
