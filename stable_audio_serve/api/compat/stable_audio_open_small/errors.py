"""Error responses of the dialect: `{"error": sentence}`, and `success` false for server errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stable_audio_serve.api.printable import printable_fault
from stable_audio_serve.api.refusals import STATUS, ExpectedError, Refusal, Refusals, in_dialect
from stable_audio_serve.core.errors import StableAudioError

# This dialect's names for fields of `GenerationRequest` that a model may refuse.
_NAMES = {
    "audio": "audio_file",
    "duration": "seconds_total",
    "init_noise_level": "style_strength",
    "model": "finetune_repo",  # the only field in which a request names a model, and adapters
}


class NoRiffsError(StableAudioError):
    """The library has no riff in the requested key. `available_keys` lists the keys it has."""

    kind = "invalid"

    def __init__(self, message: str, *, available_keys: list[str]) -> None:
        super().__init__(message, field="key")
        self.available_keys = available_keys


@dataclass(frozen=True, slots=True)
class Description:
    """One error in this dialect. `faults` lists the invalid fields, in FastAPI's format."""

    status: int
    sentence: str
    headers: Mapping[str, str] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    faults: tuple[Mapping[str, Any], ...] = ()

    def body(self) -> dict[str, Any]:
        verdict = {"success": False} if self.status >= 500 else {}
        return {**verdict, "error": self.sentence, **self.extra}


def render_error(request: Request, error: ExpectedError) -> Response:
    """Return the response to an expected error."""
    description = describe_error(request, error)
    return JSONResponse(description.body(), description.status, headers=description.headers)


def describe_error(request: Request, error: ExpectedError) -> Description:
    """Return the content of the response, and add the refusal to the request's log line."""
    return _REFUSALS.answer(request, error)


def name_field(field: str, sentence: str) -> str:
    """Return `sentence`, with the name of the field in front unless the sentence contains it."""
    return sentence if field in sentence else f"{field}: {sentence}"


def _answer_fields(_: Request, faults: Sequence[Mapping[str, Any]]) -> Description:
    return Description(400, name_field(str(faults[0]["loc"][-1]), faults[0]["msg"]), faults=tuple(faults))


def _answer_http(_: Request, error: HTTPException) -> Description:
    sentence = str(error.detail)
    if sentence.startswith("audio:"):  # "audio" is the native API's name of the field; here the field is `audio_file`
        sentence = f"audio_file:{sentence.removeprefix('audio:')}"
    return Description(error.status_code, sentence, headers=error.headers)


def _answer_error(_: Request, refusal: Refusal[int]) -> Description:
    error, status, sentence = refusal.error, refusal.row, refusal.message
    if status != 400:
        return Description(status, sentence, headers=refusal.headers)
    place = ["body"]
    if error.field:
        field, sentence = in_dialect(error.field, sentence, names=_NAMES)
        place.append(field)
    extra = {"available_keys": error.available_keys} if isinstance(error, NoRiffsError) else {}
    fault = {"type": "value_error", "loc": place, "msg": sentence, "input": None}
    return Description(status, sentence, headers=refusal.headers, extra=extra, faults=(fault,))


_REFUSALS: Refusals[int, Mapping[str, Any], Description] = Refusals(
    table=STATUS,
    internal=500,
    internal_message="generation failed; request id {request_id}",
    parse_fault=lambda _, fault: [printable_fault(fault, message=fault["msg"])],
    name_field=lambda fault: fault["loc"][-1],
    answer_fields=_answer_fields,
    answer_http=_answer_http,
    answer_error=_answer_error,
)
