"""Our own job routes: the same requests as the synchronous ones, answered with a ticket; then status and audio."""

from __future__ import annotations

import uuid
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Request
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from stable_audio_serve.api.description import error_responses
from stable_audio_serve.api.files import file_answer
from stable_audio_serve.api.links import base_url
from stable_audio_serve.api.native.answers import file_stem
from stable_audio_serve.api.native.convert import parse_sampler_kwargs
from stable_audio_serve.api.native.errors import render_error
from stable_audio_serve.api.native.regions import parse_regions
from stable_audio_serve.api.native.routes import TIME_FIELDS, convert
from stable_audio_serve.api.native.schemas import (
    Controls,
    ErrorBody,
    GenerationBody,
    InpaintForm,
    ValidationErrors,
    VariationForm,
)
from stable_audio_serve.api.observe import note
from stable_audio_serve.api.routing import public_route_class, route_class
from stable_audio_serve.api.service import Service
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.jobs.job import Job, JobSpec, JobUpload, Mode

_CONTRACT: Literal["sa3"] = "sa3"
_MULTIPART = Form(media_type="multipart/form-data")
_UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": ErrorBody, "description": "No such job."}}
_SUBMIT_RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The upload or the inpaint times."},
    422: {"model": ValidationErrors, "description": "A field is missing, of the wrong type or out of range."},
    **error_responses(ErrorBody, 401, 408, 413, 500, 503),
    507: {"model": ErrorBody, "description": "The job cannot be kept, for example because the disk is full."},
}


class JobTicket(BaseModel):
    """An accepted job."""

    id: str = Field(description="32 hexadecimal digits.")
    status: Literal["queued"] = "queued"
    status_url: str = Field(description="Where to ask about it.")


class JobStatus(BaseModel):
    """A job as it is now; what is not known yet is null."""

    id: str
    status: Literal["queued", "running", "succeeded", "failed"]
    mode: Mode
    model: str
    duration: float = Field(description="Seconds.")
    steps: int | None
    output_count: int = Field(description="Variations.")
    created_at: str = Field(description="ISO 8601 with UTC offset, as the other times.")
    started_at: str | None
    completed_at: str | None
    download_url: str | None
    download_content_type: str | None
    error: str | None
    storage_backend: Literal["local", "s3"]
    storage_key: str | None
    sample_rate: int | None = Field(description="Hertz.")


def build_router(service: Service) -> APIRouter:
    """The routes over one service."""
    router = APIRouter(route_class=route_class(render_error), strict_content_type=False)
    router.include_router(_build_submission(service))
    jobs = service.jobs

    @router.get("/jobs/{job_id:hex_id}", responses={**_UNKNOWN, **error_responses(ErrorBody, 401, 500, 503)})
    async def show_job(request: Request, job_id: str) -> JobStatus:
        """How far a job is and, once it has succeeded, where its audio is."""
        job = _require(await jobs.get(_CONTRACT, job_id))
        return _describe(job, url=_job_url(service, request, job.spec.id))

    links = APIRouter(route_class=public_route_class(render_error))

    @links.head("/jobs/{job_id:hex_id}/audio", include_in_schema=False)
    @links.get("/jobs/{job_id:hex_id}/audio", response_class=Response, include_in_schema=False)
    async def download(request: Request, job_id: str) -> Response:
        """A finished job's file. Like every link that is handed out it needs no key."""
        job = _require(await jobs.get(_CONTRACT, job_id))
        if job.result is None:
            raise HTTPException(409, f"the job has no audio: it is {_status(job)}")
        return await file_answer(request, jobs, job.result.file)

    router.include_router(links)
    return router


def _build_submission(service: Service) -> APIRouter:
    router = APIRouter(prefix="/jobs", route_class=route_class(render_error), strict_content_type=False)

    async def submit(
        request: Request,
        fields: Controls,
        card: ModelCard,
        generation: GenerationRequest,
        *,
        mode: Mode,
        upload: JobUpload | None = None,
    ) -> JobTicket:
        spec = JobSpec(
            id=uuid.uuid4().hex,
            contract=_CONTRACT,
            model=card.name,
            mode=mode,
            request=generation,
            file_format=fields.response_format,
            file_stem=file_stem(card.name),
            upload=upload,
        )
        note(request.scope, job_id=spec.id)
        await service.jobs.submit(spec)
        return JobTicket(id=spec.id, status_url=_job_url(service, request, spec.id))

    @router.post("", status_code=202, responses=_SUBMIT_RESPONSES)
    async def generate(request: Request, body: GenerationBody) -> JobTicket:
        """Make audio from a text prompt, later."""
        card, generation = convert(service, request, body, sampler_kwargs=body.sampler_kwargs)
        return await submit(request, body, card, generation, mode="text-to-audio")

    @router.post("/variations", status_code=202, responses=_SUBMIT_RESPONSES)
    async def vary(request: Request, form: Annotated[VariationForm, _MULTIPART]) -> JobTicket:
        """Make a variation of uploaded audio, later."""
        card, generation = convert(service, request, form, sampler_kwargs=parse_sampler_kwargs(form.sampler_kwargs))
        generation = replace(generation, init_noise_level=form.init_noise_level)
        upload = await service.keep_upload(form.audio, card, padding_s=generation.duration_padding_s, role="init")
        return await submit(request, form, card, generation, mode="audio-to-audio", upload=upload)

    @router.post("/inpaint", status_code=202, responses=_SUBMIT_RESPONSES)
    async def inpaint(request: Request, form: Annotated[InpaintForm, _MULTIPART]) -> JobTicket:
        """Regenerate regions of uploaded audio, or continue it behind its end, later."""
        card, generation = convert(service, request, form, sampler_kwargs=parse_sampler_kwargs(form.sampler_kwargs))
        regions = parse_regions(form.model_dump(include=TIME_FIELDS), duration_s=generation.duration_s)
        generation = replace(generation, inpaint_regions_s=regions)
        upload = await service.keep_upload(form.audio, card, padding_s=generation.duration_padding_s, role="inpaint")
        return await submit(request, form, card, generation, mode="inpainting", upload=upload)

    return router


def _require(job: Job | None) -> Job:
    if job is None:
        raise HTTPException(404, "job not found")
    return job


def _job_url(service: Service, request: Request, job_id: str) -> str:
    """On the host and below the prefix that this caller used."""
    path: str = request.scope["path"]
    prefix = path.removeprefix(request.scope.get("root_path", "")).rpartition("/jobs")[0]
    return f"{base_url(request, service.settings.api)}{prefix}/jobs/{job_id}"


def _status(job: Job) -> Literal["queued", "running", "succeeded", "failed"]:
    return "failed" if job.state == "cancelled" else job.state  # the contract has no word for it


def _describe(job: Job, *, url: str) -> JobStatus:
    request, result = job.spec.request, job.result
    return JobStatus(
        id=job.spec.id,
        status=_status(job),
        mode=job.spec.mode,
        model=job.spec.model,
        duration=request.duration_s,
        steps=request.steps,
        output_count=request.batch_size,
        created_at=job.created_at.isoformat(),
        started_at=_iso(job.started_at),
        completed_at=_iso(job.completed_at),
        download_url=f"{url}/audio" if result else None,
        download_content_type=result.file.media_type if result else None,
        error=job.error.message if job.error else None,
        storage_backend="local",
        storage_key=job.spec.id if result else None,
        sample_rate=result.sample_rate_hz if result else None,
    )


def _iso(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()
