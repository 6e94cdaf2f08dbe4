"""fal's routes. Queued and synchronous requests have the same path; `targets` decides which kind a submission is."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Depends, Path, Query, Request
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from stable_audio_serve.api.compat.fal import endpoints, targets
from stable_audio_serve.api.compat.fal.described import build_description_router
from stable_audio_serve.api.compat.fal.errors import failure_of, render_error
from stable_audio_serve.api.compat.fal.proxy import TARGET_PARAMETER, dispatch
from stable_audio_serve.api.compat.fal.queue import CANCEL_REPLIES, describe_status, make_ticket
from stable_audio_serve.api.compat.fal.run import FILE_STEM, data_uri, describe_output, run
from stable_audio_serve.api.compat.fal.source import FIELD, opened_source
from stable_audio_serve.api.compat.fal.storage_routes import build_announcing_router, build_receiving_router
from stable_audio_serve.api.compat.fal.stream import stream_status
from stable_audio_serve.api.compat.fal.targets import WatchedConvertor
from stable_audio_serve.api.compat.fal.wire import (
    APP,
    OWNER,
    REQUEST_ID,
    AudioInput,
    AudioOutput,
    CancelReply,
    FalError,
    File,
    InProgress,
    Output,
    PromptedOutput,
    Queued,
    SeededOutput,
    Status,
    Ticket,
)
from stable_audio_serve.api.compat.hosted import to_request
from stable_audio_serve.api.description import error_responses
from stable_audio_serve.api.links import base_url, file_url
from stable_audio_serve.api.middleware.observe import note
from stable_audio_serve.api.routing import Scopes, route_class
from stable_audio_serve.api.service import Service
from stable_audio_serve.audio.finish import ClipOrigin, FileOrder
from stable_audio_serve.core.catalog import OPEN_FAMILY, ModelCard
from stable_audio_serve.core.generation import GenerationRequest, Role
from stable_audio_serve.core.ids import JobId
from stable_audio_serve.core.keys import Scope
from stable_audio_serve.core.sound import PLAIN_WAV, Encoding, Peaks
from stable_audio_serve.jobs.job import Job, JobRef, JobSpec, JobUpload, Mode
from stable_audio_serve.jobs.webhooks.delivery import check_webhook_url

TAG = "fal"

_HOSTS = {"": "Submit Or Run (fal)", "/queue": "Submit (fal)", "/run": "Run (fal)"}
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
_INVALID: dict[int | str, dict[str, Any]] = {
    422: {"model": FalError, "description": "A field is missing, of the wrong type or out of range."}
}
_SUBMIT_RESPONSES: dict[int | str, dict[str, Any]] = {
    **_INVALID,
    **error_responses(FalError, 401, 408, 413, 500, 503, 507),
    429: {
        "model": FalError,
        "description": "The queue is full, or this caller has reached a limit; Retry-After is the time to wait.",
    },
    504: {"model": FalError, "description": "The request did not start within X-Fal-Request-Timeout."},
}
_WATCH_RESPONSES: dict[int | str, dict[str, Any]] = {
    **_INVALID,
    **error_responses(FalError, 401, 500, 503),
    404: {"model": FalError, "description": "No such request."},
}
_RESULT_RESPONSES: dict[int | str, dict[str, Any]] = {
    **_WATCH_RESPONSES,
    400: {"model": FalError, "description": "The request is still in progress."},
    499: {"model": FalError, "description": "The request was cancelled."},
    500: {"model": FalError, "description": "The request failed."},
    504: {"model": FalError, "description": "The request did not start in time."},
}
_CANCEL_RESPONSES: dict[int | str, dict[str, Any]] = {
    **error_responses(FalError, 401, 500, 503),
    400: {"model": CancelReply, "description": "The request has already ended."},
    404: {"model": CancelReply | FalError, "description": "No such request."},
}
_PROXY_RESPONSES: dict[int | str, dict[str, Any]] = {
    **error_responses(FalError, 401),
    400: {"model": FalError, "description": "The header is missing, or the target route's own error."},
    412: {"model": FalError, "description": "The header does not name a host of fal."},
    "default": {"description": "The target route's own response."},
}
_UNKNOWN_RESPONSE: dict[int | str, dict[str, Any]] = {
    404: {"model": FalError, "description": "There is no such endpoint, or its model is not served."}
}
_MODES: Mapping[Role, Mode] = {"init": "audio-to-audio", "inpaint": "inpainting"}
_Webhook = Annotated[str | None, Query(description="URL called when a queued request ends.")]
_App = Annotated[str, Path(description="Application, such as `stable-audio-3`.", pattern=f"^{WatchedConvertor.regex}$")]
_Logs = Annotated[bool, Query(description="Include the log.")]


def build_router(service: Service) -> APIRouter:
    """Return all routes of the dialect."""

    def new_router(scopes: Scopes, *, takes_files_in_json: bool = False, **options: Any) -> APIRouter:
        kind = route_class(render_error, scopes=scopes, takes_files_in_json=takes_files_in_json)
        return APIRouter(route_class=kind, strict_content_type=False, **options)

    hosts, requests = new_router(()), new_router(("jobs",))
    _add_requests(requests, service)
    for prefix, summary in _HOSTS.items():
        for add, takes_files in ((_add_submission, False), (_add_endpoints, True)):
            add(own := new_router(_scopes_of_submission, takes_files_in_json=takes_files), service, summary=summary)
            hosts.include_router(own, prefix=prefix)
        hosts.include_router(requests, prefix=prefix, include_in_schema=prefix == "/queue")
    hosts.include_router(build_announcing_router(service))
    router = new_router((), tags=[TAG])
    router.include_router(build_description_router(service))
    router.include_router(build_receiving_router(service))
    router.include_router(hosts)

    async def proxy(request: Request) -> Response:
        """Handle a call of fal's JavaScript client with any method. The header names the intended fal URL."""
        return dispatch(request, hosts)

    for method in _METHODS:
        router.add_api_route(
            "/api/fal/proxy",
            proxy,
            methods=[method],
            summary=f"Proxy {method}",
            response_class=Response,
            responses=_PROXY_RESPONSES,
            openapi_extra={"parameters": [TARGET_PARAMETER]},
        )
    return router


def _scopes_of_submission(request: Request) -> tuple[Scope, ...]:
    return ("jobs",) if targets.means_queue(request) else ("generate",)


def _add_submission(router: APIRouter, service: Service, *, summary: str) -> None:
    card = service.backend.catalog.choose(service.settings.dialects.model, family=OPEN_FAMILY)

    @router.post(f"/{APP}/{{endpoint:fal_endpoint}}", include_in_schema=False)
    @router.post(f"/{APP}", summary=summary, responses=_SUBMIT_RESPONSES)
    async def submit(
        request: Request,
        request_id: Annotated[str, Depends(_new_request_id)],
        *,
        body: AudioInput,
        fal_webhook: _Webhook = None,
    ) -> AudioOutput | Ticket:
        """Generate audio. Below `/queue`, and on a host named `queue.*`, the request is queued."""
        generation = to_request(body, card, request_id=request.state.request_id)
        order = _Order(request_id, card, generation, peaks=body.peaks, webhook_url=fal_webhook)
        return await _submit(request, service, order=order)  # type: ignore[return-value]


def _add_endpoints(router: APIRouter, service: Service, *, summary: str) -> None:
    catalog, dialects = service.backend.catalog, service.settings.dialects

    @router.post(
        f"/{OWNER}/{{app:fal_app}}/{{endpoint:fal_endpoint}}",
        summary=summary.replace("fal", "fal, Stable Audio 3 and 2.5"),
        responses=_SUBMIT_RESPONSES | _UNKNOWN_RESPONSE,
    )
    async def submit_to(
        request: Request,
        request_id: Annotated[str, Depends(_new_request_id)],
        *,
        app: Literal["stable-audio-3", "stable-audio-25"],
        endpoint: str,
        body: Annotated[dict[str, Any], Body(description="The endpoint's input, see its own description.")],
        fal_webhook: _Webhook = None,
    ) -> PromptedOutput | SeededOutput | Ticket:
        """Generate audio with an endpoint of Stable Audio 3 or 2.5. `/api/openapi/queue/openapi.json` describes it."""
        chosen = endpoints.ENDPOINTS.get(f"{OWNER}/{app}/{endpoint}")
        if chosen is None:
            raise HTTPException(
                404, f"no endpoint {OWNER}/{app}/{endpoint[:100]}; there are {', '.join(endpoints.ENDPOINTS)}"
            )
        card, given = chosen.choose_model(catalog, dialects), chosen.parse(body)
        encoding, upload = endpoints.to_encoding(given), None
        convert = partial(endpoints.to_request, chosen, given, card=card, request_id=request.state.request_id)
        wire, base = (
            {"app": chosen.app, "sync_mode": given.values["sync_mode"]},
            base_url(request, service.settings.api),
        )
        if chosen.operation == "text-to-audio":
            order = _Order(
                request_id, card, convert(source=None), encoding=encoding, wire=wire, webhook_url=fal_webhook
            )
            return await _submit(request, service, order=order)  # type: ignore[return-value]
        async with opened_source(given.values[FIELD], service, base=base) as opened:
            source = await service.decode(opened, card, padding_s=None, field=FIELD)
            generation = convert(source=source)
            if targets.means_queue(request):
                role: Role = "init" if generation.init_audio else "inpaint"
                upload = await service.store_upload(opened, source, max_s=source.duration_s, role=role)
        order = _Order(
            request_id, card, generation, upload=upload, encoding=encoding, wire=wire, webhook_url=fal_webhook
        )
        return await _submit(request, service, order=order)  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class _Order:
    """A submission, once its input is converted."""

    request_id: str
    card: ModelCard
    generation: GenerationRequest
    encoding: Encoding = PLAIN_WAV
    peaks: Peaks | None = None
    upload: JobUpload | None = None
    webhook_url: str | None = None
    wire: Mapping[str, Any] = field(default_factory=dict)


async def _submit(request: Request, service: Service, *, order: _Order) -> Output | Ticket:
    """Run a request now, or queue it if the client means fal's queue."""
    card, generation, request_id = order.card, order.generation, order.request_id
    note(request.scope, model=card.name, duration_s=generation.duration_s, fal_request_id=request_id)
    start_within_s = targets.start_within_s(request)
    peaks = order.peaks or service.settings.audio.peaks
    if not targets.means_queue(request):
        card, generation = service.adapted(card, replace(generation, start_within_s=start_within_s))
        origin = ClipOrigin.of(generation) if service.settings.dialects.recipes else None
        file = FileOrder(peaks, encoding=order.encoding, stem=FILE_STEM, origin=origin)
        return await run(request, service, card=card, generation=generation, order=file, wire=order.wire)
    if order.webhook_url is not None:
        allow_hosts = service.settings.jobs.webhook_allow_hosts
        await check_webhook_url(order.webhook_url, field="fal_webhook", allow_hosts=allow_hosts)
    mode: Mode = "text-to-audio" if order.upload is None else _MODES[order.upload.role]
    generation = replace(generation, init_audio=None, inpaint_audio=None, priority=targets.priority(request))
    spec = JobSpec(
        id=JobId(request_id),
        contract="fal",
        model=card.name,
        mode=mode,
        request=generation,
        encoding=order.encoding,
        file_stem=FILE_STEM,
        peaks=peaks,
        with_recipe=service.settings.dialects.recipes,
        upload=order.upload,
        start_within_s=start_within_s,
        webhook_url=order.webhook_url,
        client=request.state.client,
        wire={"base_url": base_url(request, service.settings.api), **order.wire},
    )
    job = (await service.add_job(spec, card=card, caller=request.state.caller)).job
    links = targets.links_of(request, request_id, limits=service.settings.api)
    return make_ticket(job, links, position=await service.jobs.position(job))


def _add_requests(router: APIRouter, service: Service) -> None:
    limits, jobs = service.settings.api, service.jobs
    path = f"/{OWNER}/{{app:fal_watched}}/requests/{{request_id}}"

    async def find(request: Request, response: Response, *, app: _App, request_id: str) -> Job:
        job = await jobs.get(_ref(request, request_id))
        if job is None:
            raise HTTPException(404, f"no request {request_id[:100]!r}")
        request.state.fal_request_id = response.headers[REQUEST_ID] = request_id
        return job

    @router.get(f"{path}/status", responses={**_WATCH_RESPONSES, 202: {"model": Queued | InProgress}})
    async def show_status(
        request: Request, response: Response, *, job: Job = Depends(find), logs: _Logs = False
    ) -> Status:
        """Return the status: 202 while the request is queued or running, 200 when it has ended."""
        response.status_code = 200 if job.is_over else 202
        position = await jobs.position(job) if job.state == "queued" else 0
        links = targets.links_of(request, job.spec.id, limits=limits)
        events = await jobs.events(job.spec.ref) if logs else None
        return describe_status(job, links, position=position, logs=events)

    @router.get(
        f"{path}/status/stream", summary="Stream Status", response_class=EventSourceResponse, responses=_WATCH_RESPONSES
    )
    async def stream(request: Request, job: Job = Depends(find), *, logs: _Logs = False) -> Response:
        """Stream the status as server-sent events, one per change, until the request ends."""
        links = targets.links_of(request, job.spec.id, limits=limits)
        events = stream_status(jobs, job, links=links, with_logs=logs, streams=service.streams)
        return service.streams.open(events, caller=request.state.caller, headers={REQUEST_ID: job.spec.id})

    @router.get(path, responses=_RESULT_RESPONSES, response_model=Output)
    @router.get(f"{path}/response", include_in_schema=False)
    async def show_result(request: Request, job: Job = Depends(find)) -> Response:
        """Return the output of a finished request, or the error of a failed one."""
        if not job.is_over:
            raise HTTPException(400, "Request is still in progress")
        headers = {REQUEST_ID: job.spec.id}
        if job.result is None:
            failure = failure_of(job)
            return JSONResponse(failure.body, failure.status, headers={**headers, **failure.headers})
        stored, wire = job.result.file, job.spec.wire
        url = file_url(base_url(request, limits), job.result)
        if wire.get("sync_mode"):
            try:
                url = data_uri(b"".join([chunk async for chunk in jobs.read(stored)]), stored.media_type)
            except FileNotFoundError as error:
                raise HTTPException(404, "the file no longer exists") from error
        output = describe_output(
            File.of(stored, url=url), wire, seed=job.result.seeds[0], prompt=job.spec.request.prompt
        )
        return JSONResponse(output.model_dump(), headers=headers)

    @router.put(f"{path}/cancel", status_code=202, responses=_CANCEL_RESPONSES)
    async def cancel(request: Request, response: Response, *, app: _App, request_id: str) -> CancelReply:
        """Cancel a request that has not ended."""
        outcome, _ = await jobs.cancel(_ref(request, request_id))
        response.status_code, reply = CANCEL_REPLIES[outcome]
        return reply


def _ref(request: Request, request_id: str) -> JobRef:
    return JobRef("fal", request.state.client, JobId(request_id))


def _new_request_id(request: Request, response: Response) -> str:
    request_id = str(uuid.uuid4())
    request.state.fal_request_id = response.headers[REQUEST_ID] = request_id
    return request_id
