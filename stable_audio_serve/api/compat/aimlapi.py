"""The AIML API for `stable-audio`. A client submits a generation, and polls its id until the file is ready."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stable_audio_serve.api.compat.hosted import (
    DEFAULT_STEPS,
    MAX_S,
    START_DESCRIPTION,
    ClipInput,
    File,
    WholeNumber,
    resolve_model,
    to_request,
)
from stable_audio_serve.api.description import error_responses
from stable_audio_serve.api.fields import IS_NONE
from stable_audio_serve.api.links import base_url, file_url
from stable_audio_serve.api.middleware.observe import note
from stable_audio_serve.api.printable import printable
from stable_audio_serve.api.refusals import STATUS, Refusals, in_dialect
from stable_audio_serve.api.routing import route_class
from stable_audio_serve.api.service import Service
from stable_audio_serve.core.catalog import OPEN_FAMILY
from stable_audio_serve.core.errors import InvalidRequestError, StableAudioError
from stable_audio_serve.core.ids import JobId
from stable_audio_serve.jobs.job import Job, JobRef, JobSpec, State

TAG = "AIML API"
MODEL = "stable-audio"  # the API's only model name; the setting `dialects.model` selects the served model

_FIELDS = {"duration": "seconds_total"}  # this dialect's names for fields of `GenerationRequest`
_STATES: dict[State, Literal["queued", "generating", "completed", "error"]] = {
    "queued": "queued",
    "running": "generating",
    "succeeded": "completed",
    "failed": "error",
    "cancelled": "error",
}


def _without_default(schema: dict[str, Any]) -> None:
    del schema["default"]  # the default 0 is below the lowest value that clients may send


class AimlInput(ClipInput):
    """Fields of a generation."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": MODEL, "prompt": "lo-fi ambient music"}]})

    model: str = Field(description=f"`{MODEL}`, or a model of this server.")
    seconds_start: WholeNumber = Field(
        0, ge=1, le=MAX_S, description=f"{START_DESCRIPTION} Unset = 0.", json_schema_extra=_without_default
    )
    steps: WholeNumber = Field(DEFAULT_STEPS, ge=1, le=1000, description="Denoising steps.")


class AimlMeta(BaseModel):
    """Cost of the generation, always 0."""

    usage: dict[str, int] = {"credits_used": 0}


class AimlFailure(BaseModel):
    """The reason why there is no file."""

    name: str
    message: str


class AimlGeneration(BaseModel):
    """Current state of a generation."""

    id: str
    status: Literal["queued", "generating", "completed", "error"]
    audio_file: File | None = Field(None, exclude_if=IS_NONE)
    error: AimlFailure | None = Field(None, exclude_if=IS_NONE)
    meta: AimlMeta = AimlMeta()


class AimlFault(BaseModel):
    """One invalid field."""

    path: list[str | int]
    message: str
    code: str


class AimlError(BaseModel):
    """Any error."""

    statusCode: int
    message: str
    error: str
    path: str
    meta: list[AimlFault]


_BUSY = "The queue is full, or this caller has reached a limit; Retry-After is the time to wait."
_SUBMIT_RESPONSES = error_responses(AimlError, 400, 401, 408, 413, 500, 503, 507, own={429: _BUSY})
_POLL_RESPONSES = error_responses(AimlError, 400, 401, 500, 503, own={404: "No such generation."})


def build_router(service: Service) -> APIRouter:
    """Return the AIML routes."""
    catalog, jobs = service.backend.catalog, service.jobs
    card = catalog.choose(service.settings.dialects.model, family=OPEN_FAMILY)
    router = APIRouter(route_class=route_class(render_error, scopes=("jobs",)), tags=[TAG], strict_content_type=False)

    @router.post("/v2/generate/audio", summary="Submit (AIML API)", responses=_SUBMIT_RESPONSES)
    async def submit(request: Request, body: AimlInput) -> AimlGeneration:
        """Submit a generation. Poll it with the returned id."""
        model = resolve_model(catalog, body.model, names=(MODEL,), default=card)
        model, generation = service.adapted(model, to_request(body, model, request_id=request.state.request_id))
        note(request.scope, model=model.name, duration_s=generation.duration_s)
        spec = JobSpec(
            id=JobId(f"{uuid.uuid4()}:{MODEL}"),
            contract="aiml",
            model=model.name,
            mode="text-to-audio",
            request=generation,
            file_stem="generated",
            peaks=body.peaks or service.settings.audio.peaks,
            with_recipe=service.settings.dialects.recipes,
            client=request.state.client,
        )
        await service.add_job(spec, card=model, caller=request.state.caller)
        return AimlGeneration(id=spec.id, status="queued")

    @router.get("/v2/generate/audio", summary="Poll (AIML API)", responses=_POLL_RESPONSES)
    async def poll(
        request: Request, generation_id: Annotated[str, Query(description="The id from the submission.", min_length=1)]
    ) -> AimlGeneration:
        """Return the current state of a generation, with its file once it is completed."""
        ref = JobRef("aiml", request.state.client, JobId(unquote(generation_id)))  # some clients encode the colon twice
        job = await jobs.get(ref)
        if job is None:
            raise HTTPException(404, "generation_id: no such generation")
        return _describe(job, base_url(request, service.settings.api))

    return router


def _describe(job: Job, base: str) -> AimlGeneration:
    status = _STATES[job.state]
    if job.result is not None:
        file = File.of(job.result.file, url=file_url(base, job.result))
        return AimlGeneration(id=job.spec.id, status=status, audio_file=file)
    if status == "error":
        name, message = (job.error.code, job.error.message) if job.error else (job.state, "the generation ended")
        if job.error and job.error.field and name == InvalidRequestError.kind:
            _, message = in_dialect(job.error.field, message, names=_FIELDS)
        return AimlGeneration(id=job.spec.id, status=status, error=AimlFailure(name=name, message=message))
    return AimlGeneration(id=job.spec.id, status=status)


def _parse_fault(_: Request, fault: Mapping[str, Any]) -> list[AimlFault]:
    part, *path = fault["loc"]
    if not path and fault["type"] == "missing":  # the body is missing: report its required fields
        return [AimlFault(path=[name], message=fault["msg"], code="missing") for name in ("model", "prompt")]
    if fault["type"] == "json_invalid":  # here the last part of FastAPI's location is a character position, not a field
        path = []
    known_path = [printable(step) for step in path] or [part]
    return [AimlFault(path=known_path, message=printable(fault["msg"]), code=fault["type"])]


def _find_fault(_: Request, error: StableAudioError) -> AimlFault | None:
    if not isinstance(error, InvalidRequestError):
        return None
    return AimlFault(path=[error.field or "body"], message=error.message, code="value_error")


def _answer_fields(request: Request, faults: Sequence[AimlFault]) -> Response:
    what = "; ".join(f"{'.'.join(map(str, fault.path))}: {fault.message}" for fault in faults)
    part = "Query" if request.method == "GET" else "Body"
    return _answer(request, 400, message=f"{part} validation error! {what}", faults=faults)


def _answer(
    request: Request,
    status: int,
    *,
    message: str,
    faults: Sequence[AimlFault] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    body = AimlError(
        statusCode=status,
        message=message,
        error=HTTPStatus(status).phrase,
        path=request.url.path,
        meta=list(faults),
    )
    return JSONResponse(body.model_dump(), status, headers=dict(headers or {}))


_REFUSALS: Refusals[int, AimlFault, Response] = Refusals(
    table={**STATUS, "overloaded": 429},
    internal=500,
    internal_message="The generation could not be accepted; request id {request_id}",
    parse_fault=_parse_fault,
    find_fault=_find_fault,
    name_field=lambda fault: fault.path[-1],
    answer_fields=_answer_fields,
    answer_http=lambda request, error: _answer(
        request, error.status_code, message=str(error.detail), headers=error.headers
    ),
    answer_error=lambda request, refusal: _answer(
        request, refusal.row, message=refusal.message, headers=refusal.headers
    ),
)
render_error = _REFUSALS.answer  # returns the response to an expected error
