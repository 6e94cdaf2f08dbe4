"""vLLM-Omni's audio generation, release 0.30.0: `POST /v1/audio/generate`, with errors in OpenAI's format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from stable_audio_serve.api.answers import SOUND_HEADERS, encoded_answer, result_headers
from stable_audio_serve.api.description import error_responses
from stable_audio_serve.api.fields import PEAKS_DESCRIPTION, Finite, Prompt
from stable_audio_serve.api.middleware.observe import note
from stable_audio_serve.api.printable import printable
from stable_audio_serve.api.refusals import Refusal, Refusals, field_and_message, in_dialect, invalid, name_missing
from stable_audio_serve.api.routing import route_class
from stable_audio_serve.api.service import Service, resolve_seed
from stable_audio_serve.audio.finish import FileOrder, FinishedFile, finish
from stable_audio_serve.audio.stretch import time_stretch
from stable_audio_serve.core.catalog import OPEN_FAMILY, ModelCard
from stable_audio_serve.core.errors import InvalidRequestError, UnknownModelError
from stable_audio_serve.core.generation import MAX_PROMPT_CHARS, SEED_LIMIT, GenerationRequest, GenerationResult
from stable_audio_serve.core.settings import AudioSettings
from stable_audio_serve.core.sound import AudioFormat, Encoding, Peaks

TAG = "vLLM-Omni"

_WINDOW_S = 1024 * 2048 / 44_100  # longest clip of Stable Audio Open 1.0, for which the original server was written
_MAX_END_S = 512.0  # the largest start and end, in seconds, that Stable Audio Open 1.0 can be conditioned on
_DEFAULT_STEPS = 50
_DEFAULT_GUIDANCE = 7.0
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


class ResponseFormat(StrEnum):
    """`pcm` is raw samples, signed 16-bit little-endian, interleaved. `opus` is Opus in Ogg at 48 kHz."""

    WAV = "wav"
    PCM = "pcm"
    FLAC = "flac"
    MP3 = "mp3"
    OPUS = "opus"


def _check_seed(seed: int) -> int:
    if not -(2**63) <= seed < 2**63:
        raise ValueError("must fit into 64 bits, -2**63 to 2**63 - 1")
    return seed


# The range is checked here, because as a bound in the schema 2**63 - 1 would be rounded to the float 2**63.
Seed = Annotated[int, AfterValidator(_check_seed), WithJsonSchema({"type": "integer", "format": "int64"})]


class AudioBody(BaseModel):
    """One clip from a text prompt. Null means unset."""

    model_config = ConfigDict(
        extra="ignore",
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "input": "a dog barking in the distance",
                    "audio_length": 10.0,
                    "negative_prompt": "Low quality",
                    "guidance_scale": 7.0,
                    "num_inference_steps": 100,
                    "seed": 42,
                }
            ]
        },
    )

    input: Prompt = Field(description="Description of the sound.")
    model: str | None = Field(None, description="Name or alias of a served model; null = the default.")
    response_format: ResponseFormat = Field(ResponseFormat.WAV, description="Format of the audio file.")
    speed: Finite | None = Field(None, ge=0.25, le=4.0, description="Changes the length, keeps the pitch; null = 1.")
    stream_format: Literal["audio", "sse"] | None = Field(None, description="Only audio is supported.")
    audio_length: Finite | None = Field(
        None, gt=0, description="Length, seconds, up to the model's longest clip; null = 47.55 or the longest clip."
    )
    audio_start: Finite | None = Field(
        None, description="Start of the clip within a longer piece, 0 to 512 seconds; only used with audio_length."
    )
    negative_prompt: str | None = Field(
        None, max_length=MAX_PROMPT_CHARS, description="Sounds to avoid; needs guidance above 1."
    )
    guidance_scale: Finite | None = Field(None, ge=0, le=1000, description="Guidance; on above 1; null = 7.")
    num_inference_steps: int | None = Field(None, ge=1, le=1000, description="Denoising steps; null = 50.")
    seed: Seed | None = Field(None, description="Equal seeds and requests give equal bytes; null = random.")
    peaks: Peaks | None = Field(None, description=PEAKS_DESCRIPTION)


class ErrorBody(BaseModel):
    """Any error, in OpenAI's format."""

    class Error(BaseModel):
        """`code` is the HTTP status, `param` the invalid field."""

        message: str
        type: str
        param: str | None
        code: int

    error: Error


_BINARY = {"schema": {"type": "string", "format": "binary"}}
_MEDIA_TYPES = ("audio/wav", "audio/pcm", "audio/flac", "audio/mpeg", "audio/ogg")
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The audio file.",
        "content": dict.fromkeys(_MEDIA_TYPES, _BINARY),
        "headers": SOUND_HEADERS,
    },
    **error_responses(ErrorBody, 400, 401, 408, 413, 429, 500, 503, 504, own={404: "The model is not served."}),
}


@dataclass(frozen=True, slots=True)
class _Span:
    """The part of a generation from `start_s` to `end_s`, in seconds.

    If the request asks for a later end than the longest clip has, `asked_end_s` is that end.
    """

    start_s: float
    end_s: float
    asked_end_s: float


def build_router(service: Service) -> APIRouter:
    """Return the dialect's route."""
    router = APIRouter(route_class=route_class(render_error, scopes=("generate",)), tags=[TAG])

    @router.post(
        "/v1/audio/generate",
        summary="Generate (vLLM-Omni)",
        response_class=Response,
        responses=_RESPONSES,
        dependencies=[Depends(_require_json)],
    )
    async def generate(request: Request, body: AudioBody) -> Response:
        """Generate one clip from a text prompt."""
        started_at = service.clock.monotonic()
        if body.stream_format == "sse":
            raise invalid("stream_format", "sse is not supported yet; use audio")
        card = _resolve_model(service, body)
        span = _resolve_span(body, cap_s=card.max_duration_s)
        generation = _to_request(body, card, span=span, request_id=request.state.request_id)
        note(request.scope, model=card.name, duration_s=generation.duration_s)
        result = await service.generate(card, generation, caller=request.state.caller, started_at=started_at)
        output = await service.finish_by(
            result, lambda: _make_file(body, span=span, result=result, settings=service.settings.audio)
        )
        note(request.scope, num_bytes=output.file.num_bytes)
        return encoded_answer(output.file, result_headers(output))

    return router


def _resolve_model(service: Service, body: AudioBody) -> ModelCard:
    catalog = service.backend.catalog
    if body.model is None:
        return catalog.choose(service.settings.dialects.model, family=OPEN_FAMILY)
    try:
        return catalog.resolve(body.model)
    except UnknownModelError as error:
        # vLLM's message
        raise UnknownModelError(f"The model `{printable(body.model[:100])}` does not exist.", field="model") from error


def _require_json(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise invalid("Content-Type", "must be application/json", place="header")


def _resolve_span(body: AudioBody, *, cap_s: float) -> _Span:
    """Return the span that a request selects in a generation of at most `cap_s` seconds. Raises InvalidRequestError.

    A span that ends after `cap_s` is cut off there, as in the original server.
    """
    if body.audio_length is None:
        end_s = min(_WINDOW_S, cap_s)
        return _Span(0.0, end_s, end_s)
    start_s, length_s = body.audio_start or 0.0, body.audio_length
    if length_s > cap_s:
        message = f"audio_length {length_s:g} exceeds maximum {cap_s:g} seconds, the longest clip of the model"
        raise InvalidRequestError(message, field="audio_length", allowed=f"0 to {cap_s:g}")
    if not 0 <= start_s <= _MAX_END_S:
        message = f"audio_start {start_s:g} must be from 0 to {_MAX_END_S:g} seconds"
        raise InvalidRequestError(message, field="audio_start", allowed=f"0 to {_MAX_END_S:g}")
    if start_s >= cap_s:
        message = f"audio_start {start_s:g} must be less than the longest clip, {cap_s:g} seconds"
        raise InvalidRequestError(message, field="audio_start", allowed=f"0 to {cap_s:g}")
    if start_s + length_s > _MAX_END_S:
        message = f"audio_start + audio_length must be at most {_MAX_END_S:g} seconds"
        raise InvalidRequestError(message, field="audio_start")
    return _Span(start_s, min(start_s + length_s, cap_s), start_s + length_s)


def _to_request(body: AudioBody, card: ModelCard, *, span: _Span, request_id: str) -> GenerationRequest:
    """Return a request for the audio from 0 s to the end of the span.

    A model that is conditioned on a start also gets the start of the span. As in the original server, a model is
    conditioned on the end that the request asks for, also if the clip must end before.
    """
    guidance = _DEFAULT_GUIDANCE if body.guidance_scale is None else body.guidance_scale
    return GenerationRequest(
        prompt=body.input,
        duration_s=span.end_s,
        start_s=span.start_s if card.conditions_on_start else 0.0,
        conditioned_total_s=span.asked_end_s,
        seed=resolve_seed(-1 if body.seed is None else body.seed % SEED_LIMIT),
        negative_prompt=body.negative_prompt or None,
        steps=_DEFAULT_STEPS if body.num_inference_steps is None else body.num_inference_steps,
        cfg_scale=max(guidance, 1.0),  # the original server disables guidance if the value is 1 or less
        request_id=request_id,
    )


def _make_file(body: AudioBody, *, span: _Span, result: GenerationResult, settings: AudioSettings) -> FinishedFile:
    """Cut the span out of a result and encode it with the requested speed and format. Call it from a worker thread."""
    rate_hz = result.sample_rate_hz
    audio = result.audio[0]
    audio = audio[:, min(int(span.start_s * rate_hz), audio.shape[1] - 1) :]  # at least one sample
    audio = time_stretch(audio, rate_hz, speed=1.0 if body.speed is None else body.speed)
    order = FileOrder(body.peaks or settings.peaks, encoding=Encoding(AudioFormat(body.response_format)))
    return finish(replace(result, audio=(audio,)), order)


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
    if status >= 500 or not refusal.error.field:
        return _answer(status, kind, message=refusal.message, param=None, headers=refusal.headers)
    param, message = in_dialect(refusal.error.field, refusal.message, names=_NAMES)
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
