"""Job submission of the native API. A submission has the fields of a synchronous request. The response is a ticket: the
job's id and the URL of its status.

A client may send a request again with the same `Idempotency-Key`, or with the same job id if it chose the id. The
response is then the ticket of the first job.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Header, Path, Request
from starlette.responses import Response

from stable_audio_serve.api.description import error_responses
from stable_audio_serve.api.middleware.observe import note
from stable_audio_serve.api.native.convert import read_sections, to_encoding, to_finishing
from stable_audio_serve.api.native.errors import render_error
from stable_audio_serve.api.native.ignored import ignored_names
from stable_audio_serve.api.native.routes import file_stem, read_fields
from stable_audio_serve.api.native.schemas import (
    ConflictBody,
    ErrorBody,
    JobBody,
    JobInpaintForm,
    JobVariationForm,
    ValidationErrors,
)
from stable_audio_serve.api.native.status import JobTicket, job_url, jobs_base
from stable_audio_serve.api.refusals import invalid
from stable_audio_serve.api.routing import route_class
from stable_audio_serve.api.service import Service
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.core.ids import JobId, current_client
from stable_audio_serve.jobs.job import JobSpec, JobUpload, Mode
from stable_audio_serve.jobs.pieces.sections import choose_overlap, section_peaks
from stable_audio_serve.jobs.webhooks.delivery import check_webhook_url

CONTRACT: Literal["sa3"] = "sa3"
REPLAYED = "Idempotent-Replayed"

_Fields = JobBody | JobVariationForm | JobInpaintForm
_MULTIPART = Form(media_type="multipart/form-data")
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern="^[!-~]{1,255}$",
        description="1 to 255 visible ASCII characters. Repeating the request with the same key returns the same job.",
    ),
]
_ChosenId = Annotated[str, Path(pattern="^[0-9a-f]{32}$", description="32 lower-case hexadecimal digits.")]

TICKET_HEADERS = {REPLAYED: {"schema": {"type": "string", "enum": ["true"]}, "description": "The job existed already."}}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    202: {"description": "The job was accepted and stored.", "headers": TICKET_HEADERS},
    409: {"model": ConflictBody, "description": "The key or id was used for a different request."},
    422: {"model": ValidationErrors, "description": "A field is missing, of the wrong type or out of range."},
    **error_responses(ErrorBody, 401, 408, 413, 429, 500, 503, 507),
}
_UPLOAD_RESPONSES = _RESPONSES | error_responses(ErrorBody, own={400: "The upload or the inpaint times are invalid."})


def build_router(service: Service) -> APIRouter:
    """Return the submission routes."""
    router = APIRouter(
        prefix="/jobs", route_class=route_class(render_error, scopes=("jobs",)), strict_content_type=False
    )

    @router.post("", summary="Submit Generation", status_code=202, responses=_RESPONSES)
    async def generate(
        request: Request, response: Response, *, body: JobBody, idempotency_key: IdempotencyKey = None
    ) -> JobTicket:
        """Submit a job that generates audio from a text prompt."""
        return await _submit(service, request, response=response, fields=body, key=idempotency_key)

    @router.put("/{job_id:job_id}", summary="Submit Generation As", status_code=202, responses=_RESPONSES)
    async def generate_as(request: Request, response: Response, *, job_id: _ChosenId, body: JobBody) -> JobTicket:
        """Submit a job that generates audio from a text prompt, with an id chosen by the client."""
        return await _submit(service, request, response=response, fields=body, job_id=JobId(job_id))

    @router.post("/variations", summary="Submit Variation", status_code=202, responses=_UPLOAD_RESPONSES)
    async def vary(
        request: Request,
        response: Response,
        *,
        form: Annotated[JobVariationForm, _MULTIPART],
        idempotency_key: IdempotencyKey = None,
    ) -> JobTicket:
        """Submit a job that generates a variation of uploaded audio."""
        return await _submit(service, request, response=response, fields=form, key=idempotency_key)

    @router.post("/inpaint", summary="Submit Inpainting", status_code=202, responses=_UPLOAD_RESPONSES)
    async def inpaint(
        request: Request,
        response: Response,
        *,
        form: Annotated[JobInpaintForm, _MULTIPART],
        idempotency_key: IdempotencyKey = None,
    ) -> JobTicket:
        """Submit a job that regenerates regions of uploaded audio, or extends it before its start or after its end."""
        return await _submit(service, request, response=response, fields=form, key=idempotency_key)

    return router


async def _submit(
    service: Service,
    request: Request,
    *,
    response: Response,
    fields: _Fields,
    key: str | None = None,
    job_id: JobId | None = None,
) -> JobTicket:
    """Store a new job, or find the existing job if the client repeats a request. Returns the job's ticket.

    Raises RequestValidationError, and the errors of the job store.
    """
    settings = service.settings
    card, generation = await read_fields(service, request, fields=fields)
    await _check_webhook(fields, allow_hosts=settings.jobs.webhook_allow_hosts)
    mode: Mode = "inpainting" if isinstance(fields, JobInpaintForm) else "audio-to-audio"
    if isinstance(fields, JobBody):
        mode = "long-piece" if fields.sections else "text-to-audio"
    finishing = to_finishing(fields, generation)
    upload = None
    if not isinstance(fields, JobBody):
        upload = await _store_source(service, fields, card=card, generation=generation)
    # Adding a job may take long, so free the decoded audio. The job decodes the file again.
    generation = replace(generation, init_audio=None, inpaint_audio=None)
    base = jobs_base(request, limits=settings.api)
    is_chosen, job_id = job_id is not None, job_id or JobId(uuid.uuid4().hex)
    sections, peaks = read_sections(fields), fields.peaks or settings.audio.peaks
    overlap_s = fields.overlap_s if isinstance(fields, JobBody) else None
    spec = JobSpec(
        id=job_id,
        contract=CONTRACT,
        model=card.name,
        mode=mode,
        request=generation,
        encoding=to_encoding(fields),
        file_stem=file_stem(card.name),
        peaks=section_peaks(peaks) if sections else peaks,
        finishing=finishing,
        with_manifest=fields.manifest,
        with_recipe=True,
        file_prefix=f"{job_id}-",
        upload=upload,
        sections=sections,
        overlap_s=choose_overlap(overlap_s, card=card, limits=settings.api) if sections else 0.0,
        webhook_url=fields.webhook_url,
        client=request.state.client,
        id_is_chosen=is_chosen,
        idempotency_key=key,
        fingerprint=_fingerprint(request.method, mode, fields=fields, upload=upload),
        wire={"base_url": base},
    )
    added = await service.add_job(spec, card=card, caller=request.state.caller)
    note(request.scope, job_id=added.job.spec.id)
    if not added.is_new:
        response.headers[REPLAYED] = "true"
    job_id = added.job.spec.id
    return JobTicket(id=job_id, status_url=job_url(base, job_id), ignored=list(ignored_names(request)))


async def _store_source(
    service: Service, form: JobVariationForm | JobInpaintForm, *, card: ModelCard, generation: GenerationRequest
) -> JobUpload | None:
    """Store the uploaded file of a form for its job. `generation` has the audio that was decoded from the file."""
    init, edited = generation.init_audio, generation.inpaint_audio
    if (source := edited or init) is None:
        return None
    upload = await service.store_upload(
        form.audio,
        source,
        card=card,
        padding_s=generation.duration_padding_s,
        role="inpaint" if edited else "init",
    )
    return replace(upload, is_start=init is not None and edited is not None)


async def _check_webhook(fields: _Fields, *, allow_hosts: tuple[str, ...]) -> None:
    if fields.webhook_url is None:
        return
    try:
        client = current_client.get()
        await check_webhook_url(fields.webhook_url, field="webhook_url", client=client, allow_hosts=allow_hosts)
    except InvalidRequestError as error:
        raise invalid("webhook_url", error.message, value=fields.webhook_url) from error


def _fingerprint(method: str, mode: Mode, *, fields: _Fields, upload: JobUpload | None) -> str:
    """Return a hash of the route, the fields and the upload. It does not depend on the order of the fields."""
    sent = fields.model_dump(mode="json", exclude_unset=True, exclude={"audio", *(fields.model_extra or ())})
    asked = [method, mode, sent, upload.file.sha256 if upload else None]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
