"""Error responses of the native API. Invalid fields: status 422 and a list like FastAPI's. Others: one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stable_audio_serve.api.printable import printable_fault
from stable_audio_serve.api.refusals import STATUS, ExpectedError, Refusal, Refusals, in_dialect, name_missing
from stable_audio_serve.core.errors import ConflictError, InvalidRequestError, StableAudioError, UnknownModelError
from stable_audio_serve.jobs.job import JobError

ERROR_KIND = "X-Error-Kind"  # header with the error's kind in `core.errors`, because several kinds have the same status

_LORAS = ("loras", "lora_stacking")  # fields that are checked after the others, but reported like them

Description = tuple[int, dict[str, Any], Mapping[str, str] | None]  # status, body, headers


def render_error(request: Request, error: ExpectedError) -> Response:
    """Return the response to an expected error."""
    status, body, headers = describe_error(request, error)
    return JSONResponse(body, status, headers=headers)


def describe_error(request: Request, error: ExpectedError) -> Description:
    """Return status, body and headers of the response, and add the refusal to the request's log line."""
    return _REFUSALS.answer(request, error)


def with_field(error: StableAudioError | JobError) -> str:
    """Return the error's message, with the name of the invalid field in front unless the message contains it."""
    return in_dialect(error.field, error.message, names={})[1] if error.field else error.message


def _parse_fault(request: Request, fault: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [printable_fault(each, message=_sentence(each)) for each in name_missing(request, fault)]


def _sentence(fault: Mapping[str, Any]) -> str:
    """Return the message for an entry of FastAPI's list of errors. For invalid JSON it also contains the reason."""
    message: str = fault["msg"].replace("Tuple should", "List should")
    reason = fault["ctx"]["error"] if fault["type"] == "json_invalid" else ""
    return message if reason in message else f"{message}: {reason}"


def _find_fault(request: Request, error: StableAudioError) -> dict[str, Any] | None:
    if not (isinstance(error, UnknownModelError) or (isinstance(error, InvalidRequestError) and error.field in _LORAS)):
        return None
    fault = {"type": "value_error", "loc": ("body", error.field), "msg": with_field(error), "input": None}
    return _parse_fault(request, fault)[0]


def _answer_error(_: Request, refusal: Refusal[int]) -> Description:
    message = refusal.message if refusal.is_internal else with_field(refusal.error)
    code = {"code": refusal.error.code} if isinstance(refusal.error, ConflictError) else {}
    kind = {} if refusal.is_internal else {ERROR_KIND: refusal.error.kind}
    return refusal.row, {"detail": message, **code}, {**refusal.headers, **kind}


_REFUSALS: Refusals[int, dict[str, Any], Description] = Refusals(
    table={**STATUS, "conflict": 409},
    internal=500,
    internal_message="generation failed; request id {request_id}",
    parse_fault=_parse_fault,
    find_fault=_find_fault,
    name_field=lambda fault: fault["loc"][-1],
    answer_fields=lambda _, faults: (422, {"detail": faults}, {ERROR_KIND: InvalidRequestError.kind}),
    answer_http=lambda _, error: (error.status_code, {"detail": error.detail}, error.headers),
    answer_error=_answer_error,
)
