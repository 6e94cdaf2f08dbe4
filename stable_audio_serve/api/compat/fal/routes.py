"""fal's routes. Queued and synchronous requests have the same path; `targets` decides which kind a submission is."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Depends, Header, Path, Query, Request
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from stable_audio_serve.api.compat.fal.answers import (
    data_uri,
    describe_output,
    describe_result,
    describe_status,
    stream_status,
)
from stable_audio_serve.api.compat.fal.described import build_description_router
from stable_audio_serve.api.compat.fal.endpoints import ENDPOINTS, Endpoint, to_encoding, to_request
from stable_audio_serve.api.compat.fal.errors import failure_of, render_error, render_failure
from stable_audio_serve.api.compat.fal.source import FIELD, opened_source
from stable_audio_serve.api.compat.fal.storage import build_storage_routers
from stable_audio_serve.api.compat.fal.targets import TARGET_PARAMETER, WATCHED, dispatch, links_of, means_queue
from stable_audio_serve.api.compat.fal.wire import (
    APP,
    OWNER,
    REQUEST_ID,
    AudioInput,
    AudioOutput,
    CancelReply,
    FalError,
    InProgress,
    Output,
    PromptedOutput,
    Queued,
    SeededOutput,
    Status,
    Ticket,
    errors,
)
from stable_audio_serve.api.compat.hosted import File
from stable_audio_serve.api.compat.hosted import to_request as to_old_request
from stable_audio_serve.api.links import base_url, file_url, published_url
from stable_audio_serve.api.middleware.observe import note
from stable_audio_serve.api.routing import Scopes, route_class
from stable_audio_serve.api.service import Service
from stable_audio_serve.audio.finish import ClipOrigin, FileOrder
from stable_audio_serve.core.catalog import OPEN_FAMILY, ModelCard
from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.core.generation import GenerationRequest, Priority, Role
from stable_audio_serve.core.ids import JobId
from stable_audio_serve.core.keys import Scope
from stable_audio_serve.core.sound import PLAIN_WAV, Encoding, Peaks
from stable_audio_serve.jobs.job import Job, JobRef, JobSpec, JobUpload, Mode
from stable_audio_serve.jobs.queue import CancelOutcome
from stable_audio_serve.jobs.webhooks.delivery import check_webhook_url

TAG = "fal"

_HOSTS = {"": "Submit Or Run (fal)", "/queue": "Submit (fal)", "/run": "Run (fal)"}
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
_BUSY = "The queue is full, or this caller has reached a limit; Retry-After is the time to wait."
_LATE = "The request did not start within X-Fal-Request-Timeout."
_SUBMIT_RESPONSES = errors(401, 408, 413, 422, 500, 503, 507, own={429: _BUSY, 504: _LATE})
_ENDPOINT_RESPONSES = _SUBMIT_RESPONSES | errors(own={404: "There is no such endpoint, or its model is not served."})
_WATCH_RESPONSES = errors(401, 422, 500, 503, own={404: "No such request."})
_FAILURES = {499: "The request was cancelled.", 500: "The request failed.", 504: "The request did not start in time."}
_RESULT_RESPONSES = _WATCH_RESPONSES | errors(own={400: "The request is still in progress.", **_FAILURES})
_CANCEL_RESPONSES: dict[int | str, dict[str, Any]] = {
    **errors(401, 500, 503),
    400: {"model": CancelReply, "description": "The request has already ended."},
    404: {"model": CancelReply | FalError, "description": "No such request."},
}
_PROXY_RESPONSES: dict[int | str, dict[str, Any]] = {
    **errors(401, own={412: "The header does not name a host of fal."}),
    400: {"model": FalError, "description": "The header is missing, or the target route's own error."},
    "default": {"description": "The target route's own response."},
}
_CANCEL_REPLIES: dict[CancelOutcome, tuple[int, CancelReply]] = {
    "removed": (202, CancelReply(status="CANCELLATION_REQUESTED")),
    "requested": (202, CancelReply(status="CANCELLATION_REQUESTED")),
    "already_over": (400, CancelReply(status="ALREADY_COMPLETED")),
    "unknown": (404, CancelReply(status="NOT_FOUND")),
}
_FILE_STEM = "stable-audio"
_MODES: Mapping[Role | None, Mode] = {None: "text-to-audio", "init": "audio-to-audio", "inpaint": "inpainting"}
_Webhook = Annotated[str | None, Query(description="URL called when a queued request ends.")]
# These headers are not in the description: fuzzers that negate them add headers that every route ignores.
_Timeout = Annotated[
    float | None, Header(gt=0, allow_inf_nan=False, alias="x-fal-request-timeout", include_in_schema=False)
]
_Priority = Annotated[Literal["normal", "low"], Header(alias="x-fal-queue-priority", include_in_schema=False)]
_App = Annotated[str, Path(description="Application, such as `stable-audio-3`.", pattern=f"^{WATCHED}$")]
_Logs = Annotated[bool, Query(description="Include the log.")]


@dataclass(frozen=True, slots=True)
class _Submission:
    """What path, headers and query of a submission ask for, and when it arrived.

    Only queued ones use `priority` and `webhook_url`.
    """

    request_id: str
    is_queued: bool
    start_within_s: float | None
    priority: Priority
    webhook_url: str | None
    started_at: float


@dataclass(frozen=True, slots=True)
class _Order:
    """A converted input. `wire` has the application, and whether the file is returned as a data URI."""

    card: ModelCard
    generation: GenerationRequest
    encoding: Encoding = PLAIN_WAV
    peaks: Peaks | None = None
    upload: JobUpload | None = None
    wire: Mapping[str, Any] = field(default_factory=dict)


def build_router(service: Service) -> APIRouter:
    """Return all routes of the dialect."""

    def new_router(scopes: Scopes, **options: Any) -> APIRouter:
        kind = route_class(render_error, scopes=scopes, takes_files_in_json=_takes_source)
        return APIRouter(route_class=kind, strict_content_type=False, **options)

    hosts, requests = new_router(()), new_router(("jobs",))
    _add_requests(requests, service)
    for prefix, summary in _HOSTS.items():
        for add in (_add_submission, _add_endpoints):
            add(own := new_router(_scopes_of_submission), service, summary=summary)
            hosts.include_router(own, prefix=prefix)
        hosts.include_router(requests, prefix=prefix, include_in_schema=prefix == "/queue")
    announcing, receiving = build_storage_routers(service)
    hosts.include_router(announcing)
    router = new_router((), tags=[TAG])
    router.include_router(build_description_router(service))
    router.include_router(receiving)
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
    return ("jobs",) if means_queue(request) else ("generate",)


def _find_endpoint(app: str, endpoint: str) -> Endpoint | None:
    # fal's JavaScript client appends a slash if its caller names the endpoint by a URL.
    return ENDPOINTS.get(f"{OWNER}/{app}/{endpoint.removesuffix('/')}")


def _takes_source(request: Request) -> bool:
    """Whether the request is for an endpoint with source audio, which may be in the JSON body."""
    params = request.path_params
    endpoint = _find_endpoint(params.get("app", ""), params.get("endpoint", ""))
    return endpoint is not None and FIELD in endpoint.schema.model_fields


def _add_submission(router: APIRouter, service: Service, *, summary: str) -> None:
    card = service.backend.catalog.choose(service.settings.dialects.model, family=OPEN_FAMILY)

    @router.post(f"/{APP}/{{endpoint:fal_endpoint}}", include_in_schema=False)
    @router.post(f"/{APP}", summary=summary, responses=_SUBMIT_RESPONSES)
    async def generate(
        request: Request, submission: _Submission = Depends(_opener(service)), *, body: AudioInput
    ) -> AudioOutput | Ticket:
        """Generate audio. Below `/queue`, and on a host named `queue.*`, the request is queued."""
        generation = to_old_request(body, card, request_id=request.state.request_id)
        order = _Order(card, generation, peaks=body.peaks)
        return await _submit(request, service, order=order, submission=submission)  # type: ignore[return-value]


def _add_endpoints(router: APIRouter, service: Service, *, summary: str) -> None:
    @router.post(
        f"/{OWNER}/{{app:fal_app}}/{{endpoint:fal_endpoint}}",
        summary=summary.replace("fal", "fal, Stable Audio 3 and 2.5"),
        responses=_ENDPOINT_RESPONSES,
    )
    async def generate_at(
        request: Request,
        submission: _Submission = Depends(_opener(service)),
        *,
        app: Literal["stable-audio-3", "stable-audio-25"],
        endpoint: str,
        body: Annotated[dict[str, Any], Body(description="The endpoint's input, see its own description.")],
    ) -> PromptedOutput | SeededOutput | Ticket:
        """Generate audio with an endpoint of Stable Audio 3 or 2.5. `/api/openapi/queue/openapi.json` describes it."""
        chosen = _find_endpoint(app, endpoint)
        if chosen is None:
            message = f"no endpoint {OWNER}/{app}/{endpoint[:100]}; there are {', '.join(ENDPOINTS)}"
            raise HTTPException(404, message)
        card, given = chosen.choose_model(service.backend.catalog, service.settings.dialects), chosen.parse(body)
        values, upload = dict(given), None
        encoding, wire = to_encoding(given), {"app": chosen.app, "sync_mode": values["sync_mode"]}
        convert = partial(to_request, chosen, given, card=card, request_id=request.state.request_id)
        if FIELD not in values:
            generation = convert(source=None)
        else:
            async with opened_source(values[FIELD], service, request=request) as opened:
                source = await service.decode(opened, card, padding_s=None, field=FIELD)
                generation = convert(source=source)
                if submission.is_queued:
                    role: Role = "init" if generation.init_audio else "inpaint"
                    upload = await service.store_upload(opened, source, card=card, padding_s=None, role=role)
        order = _Order(card, generation, encoding, upload=upload, wire=wire)
        return await _submit(request, service, order=order, submission=submission)  # type: ignore[return-value]


async def _submit(request: Request, service: Service, *, order: _Order, submission: _Submission) -> Output | Ticket:
    """Run an order now, or queue it if the client means fal's queue. Raises errors of `core.errors`."""
    card, duration_s = order.card, order.generation.duration_s
    note(request.scope, model=card.name, duration_s=duration_s, fal_request_id=submission.request_id)
    carry_out = _queue if submission.is_queued else _run
    return await carry_out(request, service, order=order, submission=submission)


async def _run(request: Request, service: Service, *, order: _Order, submission: _Submission) -> Output:
    generation = replace(order.generation, start_within_s=submission.start_within_s)
    card, generation = service.adapted(order.card, generation)
    result = await service.generate(card, generation, caller=request.state.caller, started_at=submission.started_at)
    origin = ClipOrigin.of(generation) if service.settings.dialects.recipes else None
    peaks = order.peaks or service.settings.audio.peaks
    output = await service.finish(result, FileOrder(peaks, encoding=order.encoding, stem=_FILE_STEM, origin=origin))
    note(request.scope, num_bytes=output.file.num_bytes)
    name, media_type = f"{_FILE_STEM}.{order.encoding.file_format}", output.file.media_type
    if order.wire.get("sync_mode"):
        url = await service.compute(lambda: data_uri(output.file.to_bytes(), media_type))
    else:
        file_id, _ = await service.jobs.publish(
            output.file.chunks, media_type=media_type, file_name=name, clips=output.clips, made_on=result.made_on
        )
        url = published_url(base_url(request, service.settings.api), file_id, file_name=name)
    file = File(url=url, content_type=media_type, file_name=name, file_size=output.file.num_bytes)
    return describe_output(file, order.wire.get("app"), seed=result.seeds[0], prompt=generation.prompt)


async def _queue(request: Request, service: Service, *, order: _Order, submission: _Submission) -> Ticket:
    settings, request_id = service.settings, submission.request_id
    generation = replace(order.generation, init_audio=None, inpaint_audio=None, priority=submission.priority)
    spec = JobSpec(
        id=JobId(request_id),
        contract="fal",
        model=order.card.name,
        mode=_MODES[order.upload.role if order.upload else None],
        request=generation,
        encoding=order.encoding,
        file_stem=_FILE_STEM,
        peaks=order.peaks or settings.audio.peaks,
        with_recipe=settings.dialects.recipes,
        upload=order.upload,
        start_within_s=submission.start_within_s,
        webhook_url=submission.webhook_url,
        client=request.state.client,
        wire={"base_url": base_url(request, settings.api), **order.wire},
    )
    job = (await service.add_job(spec, card=order.card, caller=request.state.caller)).job
    links = links_of(request, request_id, limits=settings.api)
    position = 0
    with suppress(StorageError):  # an error would make the client submit the accepted job again
        position = await service.jobs.position(job)
    return Ticket(**links.model_dump(), gateway_request_id=request_id, queue_position=position)


def _opener(service: Service) -> Callable[..., Awaitable[_Submission]]:
    """Return the dependency that checks what a submission asks for besides its input."""

    async def open_submission(
        request: Request,
        response: Response,
        *,
        fal_webhook: _Webhook = None,
        timeout_s: _Timeout = None,
        priority: _Priority = "normal",
    ) -> _Submission:
        request_id, started_at = str(uuid.uuid4()), service.clock.monotonic()
        request.state.fal_request_id = response.headers[REQUEST_ID] = request_id
        is_queued = means_queue(request)
        if is_queued and fal_webhook is not None:
            allow_hosts = service.settings.jobs.webhook_allow_hosts
            client = request.state.caller.name
            await check_webhook_url(fal_webhook, field="fal_webhook", client=client, allow_hosts=allow_hosts)
        rank: Priority = "batch" if priority == "low" else "interactive"
        return _Submission(request_id, is_queued, timeout_s, rank, fal_webhook, started_at=started_at)

    return open_submission


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
        links = links_of(request, job.spec.id, limits=limits)
        events = await jobs.events(job.spec.ref) if logs else None
        return describe_status(job, links, position=position, logs=events)

    @router.get(
        f"{path}/status/stream", summary="Stream Status", response_class=EventSourceResponse, responses=_WATCH_RESPONSES
    )
    async def stream(request: Request, job: Job = Depends(find), *, logs: _Logs = False) -> Response:
        """Stream the status as server-sent events, one per change, until the request ends."""
        links = links_of(request, job.spec.id, limits=limits)
        events = stream_status(jobs, job, links=links, with_logs=logs, streams=service.streams)
        return service.streams.open(events, caller=request.state.caller, headers={REQUEST_ID: job.spec.id})

    @router.get(path, responses=_RESULT_RESPONSES, response_model=Output)
    @router.get(f"{path}/response", include_in_schema=False)
    async def show_result(request: Request, job: Job = Depends(find)) -> Response:
        """Return the output of a finished request, or the error of a failed one."""
        if not job.is_over:
            raise HTTPException(400, "Request is still in progress")
        if job.result is None:
            return render_failure(request, failure_of(job))
        url, stored = file_url(base_url(request, limits), job.result), job.result.file
        if job.spec.wire.get("sync_mode"):
            try:
                content = b"".join([chunk async for chunk in jobs.artifacts.read(stored)])
                url = await service.compute(lambda: data_uri(content, stored.media_type))
            except FileNotFoundError as error:
                raise HTTPException(404, "the file no longer exists") from error
        return JSONResponse(describe_result(job, job.result, url=url).model_dump(), headers={REQUEST_ID: job.spec.id})

    @router.put(f"{path}/cancel", status_code=202, responses=_CANCEL_RESPONSES)
    async def cancel(request: Request, response: Response, *, app: _App, request_id: str) -> CancelReply:
        """Cancel a request that has not ended."""
        outcome, _ = await jobs.cancel(_ref(request, request_id))
        response.status_code, reply = _CANCEL_REPLIES[outcome]
        return reply


def _ref(request: Request, request_id: str) -> JobRef:
    return JobRef("fal", request.state.client, JobId(request_id))
