"""Stability AI's REST API: Stable Audio 3 as jobs whose result is polled, Stable Audio 2 and 2.5 in one request."""

from __future__ import annotations

import base64
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, UploadFile
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from stable_audio_serve.api.answers import chain, file_chunks
from stable_audio_serve.api.compat.hosted import resolve_model
from stable_audio_serve.api.description import error_responses
from stable_audio_serve.api.fields import NOT_BLANK, Finite
from stable_audio_serve.api.middleware.observe import note
from stable_audio_serve.api.printable import printable
from stable_audio_serve.api.refusals import STATUS, Refusal, Refusals, field_and_message, in_dialect, invalid
from stable_audio_serve.api.routing import route_class
from stable_audio_serve.api.service import Service
from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.audio.encode import EncodedFile
from stable_audio_serve.audio.finish import ClipOrigin, FileOrder
from stable_audio_serve.core.catalog import SA3_FAMILY, ModelCard
from stable_audio_serve.core.errors import UnknownModelError
from stable_audio_serve.core.generation import GenerationRequest, Role, SourceAudio
from stable_audio_serve.core.ids import JobId
from stable_audio_serve.core.keys import Scope
from stable_audio_serve.core.sound import AudioFormat, Encoding
from stable_audio_serve.jobs.job import JobError, JobRef, JobSpec

TAG = "Stability"
EXPOSED_HEADERS = ("Finish-Reason", "Seed")

_SOURCE_S = (6.0, 380.0)  # length of source audio for Stable Audio 3
_CREDITS = 1_000_000.0  # the balance of a key without a limit
_LARGEST_SEED = 4_294_967_294

# Names of errors that are not the phrase of their HTTP status.
_NAMES = {413: "payload_too_large", 429: "rate_limit_exceeded", 500: "internal_error"}
# This dialect's names for fields of `GenerationRequest` that a model may refuse.
_FIELDS = {"init_noise_level": "strength", "inpaint_start_seconds": "mask_start"}
_STATUS = {**STATUS, "overloaded": 429}


@dataclass(frozen=True, slots=True)
class _Version:
    """The values that one version of Stable Audio accepts. Each pair has the lowest and the highest."""

    names: tuple[str, ...]  # values of the field `model`; the first is the default
    longest_s: float
    steps: tuple[int, int]
    default_steps: int
    default_cfg_scale: float
    lowest_strength: float = 0.0


_V3 = _Version(("stable-audio-3",), 380.0, (4, 8), 8, 1.0)
_V25 = _Version(("stable-audio-2.5", "stable-audio-2"), 190.0, (4, 8), 8, 1.0, 0.01)
_V2 = replace(_V25, steps=(30, 100), default_steps=50, default_cfg_scale=7.0, lowest_strength=0.0)


# The widest ranges of all versions. `_to_request` checks the range that applies, so that a refusal names it.
_Duration = Annotated[Finite, Field(json_schema_extra={"minimum": 1, "maximum": 380})]
_Steps = Annotated[int, Field(json_schema_extra={"minimum": 4, "maximum": 100})]
_Strength = Annotated[Finite, Field(json_schema_extra={"minimum": 0, "maximum": 1})]


class TextForm(BaseModel):
    """Fields of every generation."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    prompt: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=10_000)] = Field(
        description="Description of the sound.", json_schema_extra={"pattern": NOT_BLANK}
    )
    model: str | None = Field(None, description="The API's model name, or a model of this server.")
    duration: _Duration | None = Field(
        None, description="Length, seconds; unset = that of the source, or 190; at most the model's."
    )
    seed: int = Field(0, ge=0, le=_LARGEST_SEED, description="0 = random.")
    steps: _Steps | None = Field(None, description="Denoising steps; unset = 8, or 50 for stable-audio-2.")
    cfg_scale: Finite | None = Field(
        None, ge=1, le=25, description="Guidance; unset = 1, or 7 for stable-audio-2; not used by all models."
    )
    output_format: Literal["mp3", "wav"] = Field("mp3", description="Format of the audio file.")

    @property
    def encoding(self) -> Encoding:
        return Encoding(AudioFormat(self.output_format))


class _SourceForm(TextForm):
    audio: UploadFile = Field(description="MP3 or WAV file.", json_schema_extra={"format": "binary"})


class AudioForm(_SourceForm):
    """A variation of source audio."""

    strength: _Strength = Field(1.0, description="Low keeps more of the source; at 1 it has no influence.")


class RegionForm(_SourceForm):
    """Source audio with a region to regenerate."""

    mask_start: Finite = Field(30.0, ge=0, le=380, description="Start of the region, seconds.")
    mask_end: Finite = Field(380.0, ge=0, le=380, description="End of the region, seconds; at most that of the clip.")


class StabilityTicket(BaseModel):
    """An accepted generation."""

    id: str


class StabilityProgress(StabilityTicket):
    """A generation that has not ended."""

    status: Literal["in-progress"] = "in-progress"


class StabilityAudio(BaseModel):
    """A finished generation; `audio` is base64."""

    audio: str
    seed: int
    finish_reason: Literal["SUCCESS"] = "SUCCESS"


class StabilityError(BaseModel):
    """Any error."""

    id: str
    name: str
    errors: list[str]


_ERRORS = error_responses(StabilityError, 400, 401, 408, 413, 429, 500, 503, 504, 507)
_RESULT_ERRORS: dict[int | str, dict[str, Any]] = {
    202: {"model": StabilityProgress},
    **error_responses(StabilityError, 401, 500, 503, own={404: "No such generation."}),
}
_AUDIO: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The audio file, or JSON if the request accepts `application/json`.",
        "model": StabilityAudio,
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("audio/mpeg", "audio/wav")},
    }
}
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
_MULTIPART = Form(media_type=_FORMS[0])
_TextBody = Annotated[TextForm, _MULTIPART]
_AudioBody = Annotated[AudioForm, _MULTIPART]
_InpaintBody = Annotated[RegionForm, _MULTIPART]


def build_router(service: Service) -> APIRouter:
    """Return the dialect's routes."""
    router = APIRouter(tags=[TAG])
    parts: Mapping[Callable[[APIRouter, Service], None], Scope | None]
    parts = {_add_jobs: "jobs", _add_synchronous: "generate", _add_user: None}
    for add, scope in parts.items():
        own = APIRouter(
            route_class=route_class(render_error, scopes=() if scope is None else (scope,), takes_bare_key=True)
        )
        add(own, service)
        router.include_router(own)
    return router


def _add_jobs(router: APIRouter, service: Service) -> None:
    async def submit(request: Request, form: TextForm) -> StabilityTicket:
        card, source, upload = _resolve_model(service, form, version=_V3), None, None
        if isinstance(form, _SourceForm):
            source = await service.decode(form.audio, card, padding_s=None, allowed_s=_SOURCE_S)
        generation = _to_request(form, card, version=_V3, source=source, request_id=request.state.request_id)
        note(request.scope, model=card.name, duration_s=generation.duration_s)
        if isinstance(form, _SourceForm) and source is not None:
            role: Role = "inpaint" if isinstance(form, RegionForm) else "init"
            upload = await service.store_upload(form.audio, source, card=card, padding_s=None, role=role)
        spec = JobSpec(
            id=JobId(secrets.token_hex(32)),
            contract="stability",
            model=card.name,
            mode="text-to-audio" if upload is None else "inpainting" if upload.role == "inpaint" else "audio-to-audio",
            request=replace(generation, init_audio=None, inpaint_audio=None),
            encoding=form.encoding,
            peaks=service.settings.audio.peaks,
            with_recipe=service.settings.dialects.recipes,
            upload=upload,
            client=request.state.client,
        )
        await service.add_job(spec, card=card, caller=request.state.caller)
        return StabilityTicket(id=spec.id)

    options = {"status_code": 202, "response_model": StabilityTicket, "responses": _ERRORS}
    _add_routes(router, submit, version="stable-audio", **options)

    @router.get(
        "/v2beta/audio/results/{id}",
        summary="Result (Stability)",
        response_class=Response,
        responses={**_AUDIO, **_RESULT_ERRORS},
    )
    async def show_result(request: Request, id: str) -> Response:
        """Return the result of a generation, 202 while there is none."""
        job = await service.jobs.get(JobRef("stability", request.state.client, JobId(id)))
        if job is None:
            raise HTTPException(404, "id: no such generation")
        if not job.is_over:
            return JSONResponse(StabilityProgress(id=job.spec.id).model_dump(), 202)
        if job.result is None:
            error = job.error or JobError(job.state, "the generation was cancelled")
            status = _STATUS.get(error.code, 500)
            sentence = _sentence(status, error.field, message=error.message)
            return _answer(request, status if status < 429 else 500, [sentence])
        file = job.result.file
        chunks = service.jobs.artifacts.read(file)
        try:
            first = await anext(chunks, b"")
        except FileNotFoundError as error:
            raise HTTPException(404, "id: the result is no longer stored") from error
        return _audio(request, chain(first, chunks), file=file, seed=job.result.seeds[0])


def _add_synchronous(router: APIRouter, service: Service) -> None:
    async def run(request: Request, form: TextForm) -> Response:
        started_at = service.clock.monotonic()
        version = _V2 if form.model == "stable-audio-2" else _V25
        card, source = _resolve_model(service, form, version=version), None
        if isinstance(form, _SourceForm):
            source = await service.decode(form.audio, card, padding_s=None)
        generation = _to_request(form, card, version=version, source=source, request_id=request.state.request_id)
        card, generation = service.adapted(card, generation)
        note(request.scope, model=card.name, duration_s=generation.duration_s)
        origin = ClipOrigin.of(generation) if service.settings.dialects.recipes else None
        order = FileOrder(service.settings.audio.peaks, encoding=form.encoding, origin=origin)
        result = await service.generate(card, generation, caller=request.state.caller, started_at=started_at)
        file = (await service.finish(result, order)).file
        return _audio(request, file_chunks(file), file=file, seed=result.seeds[0])

    options = {"response_class": Response, "response_model": None, "responses": _AUDIO | _ERRORS}
    _add_routes(router, run, version="stable-audio-2", **options)


def _add_routes(router: APIRouter, run: Callable[..., Awaitable[Any]], *, version: str, **options: Any) -> None:
    """Add the routes of the three kinds of generation, which differ only in their forms."""

    async def generate(request: Request, form: _TextBody) -> Any:
        """Generate audio from a text prompt."""
        return await run(request, form)

    async def vary(request: Request, form: _AudioBody) -> Any:
        """Generate a variation of source audio."""
        return await run(request, form)

    async def inpaint(request: Request, form: _InpaintBody) -> Any:
        """Regenerate a region of source audio."""
        return await run(request, form)

    for path, route in (("text-to-audio", generate), ("audio-to-audio", vary), ("inpaint", inpaint)):
        summary = f"{path.replace('-', ' ').title()}, {version} (Stability)"
        router.post(f"/v2beta/audio/{version}/{path}", summary=summary, **options)(route)


def _add_user(router: APIRouter, service: Service) -> None:
    responses = error_responses(StabilityError, 401, 503)

    @router.get("/v1/user/account", summary="Account (Stability)", responses=responses)
    async def show_account(request: Request) -> dict[str, Any]:
        """Describe the key. Clients call this to check it."""
        name = request.state.caller.key.label or "anybody"
        organization = {"id": name, "name": "stable-audio-serve", "is_default": True}
        return {"id": name, "email": f"{name}@localhost", "organizations": [organization], "profile_picture": None}

    @router.get("/v1/user/balance", summary="Balance (Stability)", responses=responses)
    async def show_balance(request: Request) -> dict[str, float]:
        """Return the seconds of audio that the key may still have in this minute, or 1,000,000 without a limit."""
        left_s = await service.limiter.audio_left_s(request.state.caller.key)
        return {"credits": _CREDITS if left_s is None else round(left_s, 2)}


def _resolve_model(service: Service, form: TextForm, *, version: _Version) -> ModelCard:
    catalog = service.backend.catalog
    default = catalog.choose(service.settings.dialects.stability_model, family=SA3_FAMILY)
    return resolve_model(catalog, form.model, names=version.names, default=default)


def _to_request(
    form: TextForm, card: ModelCard, *, version: _Version, source: SourceAudio | None, request_id: str
) -> GenerationRequest:
    """Return the request. Raises RequestValidationError.

    Without `duration` the clip is as long as the source, or 190 s, but no longer than the model's longest clip.
    """
    longest_s = min(version.longest_s, card.max_duration_s)
    unset_s = 190.0 if source is None else source.duration_s
    duration_s = min(unset_s, longest_s) if form.duration is None else form.duration
    _check("duration", form.duration, low=1, high=longest_s, where=f" for the model {card.name}")
    _check("steps", form.steps, low=version.steps[0], high=version.steps[1])
    request = GenerationRequest(
        prompt=form.prompt,
        duration_s=duration_s,
        seed=form.seed or secrets.randbelow(_LARGEST_SEED) + 1,
        steps=version.default_steps if form.steps is None else form.steps,
        cfg_scale=version.default_cfg_scale if form.cfg_scale is None else form.cfg_scale,
        request_id=request_id,
    )
    if isinstance(form, AudioForm):
        _check("strength", form.strength, low=version.lowest_strength, high=1)
        level = card.noise_level(form.strength, sampler=None)
        return replace(request, init_audio=source, init_noise_level=level)
    if isinstance(form, RegionForm):
        end_s = min(form.mask_end, duration_s)
        if form.mask_start >= end_s:
            allowed = f"less than mask_end and than the length of the clip ({duration_s:g})"
            raise invalid("mask_start", f"must be {allowed}, not {form.mask_start:g}")
        return replace(request, inpaint_audio=source, inpaint_regions_s=((form.mask_start, end_s),))
    return request


def _audio(request: Request, content: AsyncIterator[bytes], *, file: EncodedFile | StoredFile, seed: int) -> Response:
    """Return the response with an audio file, as bytes or in JSON."""
    headers = {"seed": str(seed), "finish-reason": "SUCCESS", "Vary": "Accept"}
    accepted = {part.partition(";")[0].strip() for part in request.headers.get("accept", "").lower().split(",")}
    if "application/json" not in accepted or any(part.startswith("audio/") for part in accepted):
        headers["Content-Length"] = str(file.num_bytes)
        return StreamingResponse(content, headers=headers, media_type=file.media_type)
    start, end = StabilityAudio(audio="|", seed=seed).model_dump_json().encode().split(b"|")
    headers["Content-Length"] = str(len(start) + 4 * -(-file.num_bytes // 3) + len(end))

    async def in_base64() -> AsyncIterator[bytes]:
        yield start
        rest = bytearray()
        async for chunk in content:
            rest += chunk
            whole = len(rest) // 3 * 3  # so that only the last group is padded
            yield base64.b64encode(rest[:whole])
            del rest[:whole]
        yield base64.b64encode(rest) + end

    return StreamingResponse(in_base64(), headers=headers, media_type="application/json")


def _parse_fault(request: Request, fault: Mapping[str, Any]) -> list[tuple[str, str]]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if fault["type"] == "missing" and kind not in {*_FORMS, ""}:  # the fields may be in the body, but it is not parsed
        return [("content-type", f"must be {_FORMS[0]}, not {printable(kind)}")]
    return field_and_message(request, fault)


def _answer_error(request: Request, refusal: Refusal[int]) -> Response:
    sentence = _sentence(refusal.row, refusal.error.field, message=refusal.message)
    return _answer(request, refusal.row, [sentence], refusal.headers)


def _sentence(status: int, field: str | None, *, message: str) -> str:
    """Return the message of an error. If a field is invalid, the message names it."""
    return in_dialect(field, message, names=_FIELDS)[1] if field and status == 400 else message


def _check(field: str, value: float | None, *, low: float, high: float, where: str = "") -> None:
    if value is not None and not low <= value <= high:
        raise invalid(field, f"must be from {low:g} to {high:g}{where}")


def _answer(  # noqa: PLR0917
    request: Request, status: int, errors: Sequence[str], headers: Mapping[str, str] | None = None
) -> Response:
    name = _NAMES.get(status) or HTTPStatus(status).phrase.lower().replace(" ", "_")
    body = StabilityError(id=request.state.request_id, name=name, errors=list(errors))
    return JSONResponse(body.model_dump(), status, headers=dict(headers or {}))


_REFUSALS: Refusals[int, tuple[str, str], Response] = Refusals(
    table=_STATUS,
    internal=500,
    internal_message="the generation could not be accepted; request id {request_id}",
    parse_fault=_parse_fault,
    find_fault=lambda _, error: ("model", error.message) if isinstance(error, UnknownModelError) else None,
    name_field=lambda fault: fault[0],
    answer_fields=lambda request, faults: _answer(request, 400, [*dict.fromkeys(map(": ".join, faults))]),
    answer_http=lambda request, error: _answer(request, error.status_code, [str(error.detail)], error.headers),
    answer_error=_answer_error,
)
render_error = _REFUSALS.answer  # returns the response to an expected error
