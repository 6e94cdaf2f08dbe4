"""Job routes of the native API: list, status, cancellation, events and audio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from pydantic import BaseModel, Field
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.exceptions import HTTPException
from starlette.responses import Response

from stable_audio_serve.api.answers import PART_RESPONSES, RECIPE_HEADER, SOUND_HEADERS, file_answer
from stable_audio_serve.api.description import error_responses
from stable_audio_serve.api.middleware.observe import note
from stable_audio_serve.api.native import submission
from stable_audio_serve.api.native.errors import render_error
from stable_audio_serve.api.native.ignored import WARNING_HEADER, check_names, ignored_names, warning_headers
from stable_audio_serve.api.native.routes import MEDIA_TYPES
from stable_audio_serve.api.native.schemas import ConflictBody, ErrorBody, ValidationErrors
from stable_audio_serve.api.native.status import (
    JobPage,
    JobProgress,
    JobStatus,
    brief,
    describe,
    jobs_base,
    progress_of,
    recipes_of,
)
from stable_audio_serve.api.native.submission import CONTRACT
from stable_audio_serve.api.refusals import invalid
from stable_audio_serve.api.routing import public_route_class, route_class
from stable_audio_serve.api.section_audio import follow_answer, section_answer
from stable_audio_serve.api.service import Service
from stable_audio_serve.api.streams import EventStreams
from stable_audio_serve.core.errors import ConflictError, InvalidRequestError
from stable_audio_serve.core.ids import JobId
from stable_audio_serve.jobs.job import Job, JobEvent, JobRef, State
from stable_audio_serve.jobs.queue import JobQueue

TAG = "Stable Audio 3 jobs"

_END = "end"  # type and id of the last event of a stream
_EXAMPLE = (
    'id: 17\nevent: progress\ndata: {"stage":"denoising","fraction":0.45,"eta_seconds":2.1,"queue_position":null,'
    '"message":null,"at":"2026-11-20T14:00:01.250000+00:00"}\n\n'
)

_LastEventId = Annotated[
    str | None,
    Header(
        alias="Last-Event-ID",
        pattern=f"^([0-9]{{1,18}}|{_END})$",
        description="Id of the last received event; the stream continues after it.",
    ),
]


class JobProgressEvent(JobProgress):
    """The data of a `progress` event."""

    message: str | None = Field(description="A log line for the client.")
    at: str | None = Field(description="Time of the event; null = current state.")


async def _stream_events(
    jobs: JobQueue, job: Job, *, base: str, after: int, streams: EventStreams
) -> AsyncIterator[ServerSentEvent]:
    """Yield `progress` events after event id `after`, then one `end` event with the job's status."""
    async for change in streams.follow(jobs, job, after=after):
        for event in change.events:
            yield _sse(_of_event(event, change.job), kind="progress", event_id=str(event.id))
        if change.job.is_over:
            status = await asyncio.to_thread(describe, change.job, jobs.artifacts, base=base)
            yield _sse(status, kind=_END, event_id=_END)
        elif not change.events or (change.position is not None and change.events[-1].stage == change.job.stage):
            # An event with another stage is newer than the job's state, because events are read after it.
            now = progress_of(change.job, position=change.position)  # not a stored event, so it has no id
            yield _sse(JobProgressEvent(**now.model_dump(), message=None, at=None), kind="progress")


def _of_event(event: JobEvent, job: Job) -> JobProgressEvent:
    return JobProgressEvent(
        stage=event.stage,
        fraction=event.fraction,
        sections_done=event.num_sections if job.spec.sections else None,
        sections=len(job.spec.sections) or None,
        eta_seconds=event.eta_s,
        queue_position=None,
        message=event.message,
        at=event.at.isoformat(),
    )


def _sse(body: BaseModel, *, kind: str, event_id: str | None = None) -> ServerSentEvent:
    return ServerSentEvent(body.model_dump_json(ensure_ascii=True), event=kind, id=event_id, sep="\n")


_READ_RESPONSES = error_responses(ErrorBody, 401, 500, 503, own={404: "No such job."})
_LIST_RESPONSES: dict[int | str, dict[str, Any]] = {
    422: {"model": ValidationErrors, "description": "A parameter has the wrong type or is out of range."},
    **error_responses(ErrorBody, 401, 500, 503),
}
_CANCEL_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The job was queued and is now cancelled."},
    202: {"model": JobStatus, "description": "The job is running and stops within one denoising step."},
    409: {"model": ConflictBody, "description": "The job has already ended."},
    **_READ_RESPONSES,
}
_NO_AUDIO = {
    404: "No such job or section, or its file no longer exists.",
    409: "The job has no audio, or none yet.",
}
_AUDIO_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The audio file, or a ZIP of several variations.",
        "content": {kind: {} for kind in MEDIA_TYPES},
        "headers": {**SOUND_HEADERS, **RECIPE_HEADER, **WARNING_HEADER},
    },
    **PART_RESPONSES,
    422: {"model": ValidationErrors, "description": "A parameter is wrong, or unknown if the server refuses those."},
    **error_responses(ErrorBody, 416, 429, 500, 503, own=_NO_AUDIO),
}
_EVENTS_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "`progress` events, then one `end` event with the job's status.",
        "content": {"text/event-stream": {"example": _EXAMPLE}},
    },
    204: {"description": "The stream ended with the last received event."},
    422: {"model": ValidationErrors, "description": "An id that does not belong to this stream."},
    **_READ_RESPONSES,
}


def build_router(service: Service) -> APIRouter:
    """Return the job routes, including the routes of the module `submission`."""
    router = APIRouter(route_class=route_class(render_error, scopes=("jobs",)), tags=[TAG], strict_content_type=False)
    router.include_router(submission.build_router(service))
    jobs, limits = service.jobs, service.settings.api
    path = "/jobs/{job_id:job_id}"

    async def statuses_of(request: Request, found: Sequence[Job], *, position: int | None = None) -> list[JobStatus]:
        base = jobs_base(request, limits=limits)

        def describe_all() -> list[JobStatus]:
            return [describe(job, jobs.artifacts, base=base, position=position) for job in found]

        if any(job.result is not None for job in found):  # signing download links may block to get credentials
            return await asyncio.to_thread(describe_all)
        return describe_all()

    async def status_of(request: Request, job: Job, *, position: int | None = None) -> JobStatus:
        (status,) = await statuses_of(request, [job], position=position)
        return status

    @router.get("/jobs", responses=_LIST_RESPONSES)
    async def list_jobs(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100, description="Most jobs per page.")] = 20,
        *,
        cursor: Annotated[
            str | None, Query(pattern="^[0-9a-f]{32}$", description="`next_cursor` of the previous page.")
        ] = None,
        status: Annotated[State | None, Query(description="Only jobs with this status.")] = None,
    ) -> JobPage:
        """List the jobs of the caller's key, newest first. Queue positions are null in lists."""
        check_names(request, (), limits=limits, parameters=("limit", "cursor", "status"))
        try:
            page = await jobs.list_own(CONTRACT, request.state.client, state=status, cursor=cursor, limit=limit)
        except InvalidRequestError as error:
            raise invalid("cursor", error.message, value=cursor, place="query") from error
        statuses = await statuses_of(request, page.jobs)
        briefs = [brief(status) for status in statuses]
        return JobPage(jobs=briefs, next_cursor=page.next_cursor, ignored=list(ignored_names(request)))

    @router.get(path, responses=_READ_RESPONSES)
    async def show_job(request: Request, job_id: str) -> JobStatus:
        """Return a job's progress and, once it has succeeded, the link to its audio."""
        job = _require(await jobs.get(_ref(request, job_id)))
        position = await jobs.position(job) if job.state == "queued" else None
        return await status_of(request, job, position=position)

    @router.delete(path, responses=_CANCEL_RESPONSES)
    async def cancel_job(request: Request, response: Response, *, job_id: str) -> JobStatus:
        """Cancel a job: immediately if it is queued, within one denoising step if it is running."""
        outcome, found = await jobs.cancel(_ref(request, job_id))
        job = _require(found)
        note(request.scope, job_id=job.spec.id, outcome=outcome)
        if outcome == "already_over":
            raise ConflictError(f"the job has already ended: it is {job.state}", code="job_is_over")
        response.status_code = 200 if outcome == "removed" else 202
        return await status_of(request, job)

    @router.get(
        "/jobs/{job_id:hex_id}/events",
        summary="Stream Job Events",
        response_class=EventSourceResponse,
        responses=_EVENTS_RESPONSES,
    )
    async def stream(request: Request, job_id: str, *, last_event_id: _LastEventId = None) -> Response:
        """Stream a job's progress as server-sent events until it ends. A client that reconnects misses no event."""
        job = _require(await jobs.get(_ref(request, job_id)))
        if last_event_id == _END:
            return Response(status_code=204)  # browsers do not reconnect after this status
        base = jobs_base(request, limits=limits)
        after = int(last_event_id or 0)
        events = _stream_events(jobs, job, base=base, after=after, streams=service.streams)
        return service.streams.open(events, caller=request.state.caller)

    router.include_router(_build_links(service))
    return router


def _build_links(service: Service) -> APIRouter:
    """Return the download route. Links to it work without an API key."""
    jobs = service.jobs
    links = APIRouter(route_class=public_route_class(render_error, scopes=("jobs",)))

    @links.head("/jobs/{job_id:hex_id}/audio", include_in_schema=False)
    @links.get(
        "/jobs/{job_id:hex_id}/audio", summary="Download Job Audio", response_class=Response, responses=_AUDIO_RESPONSES
    )
    async def download(
        request: Request,
        job_id: str,
        *,
        section: Annotated[
            int | None, Query(ge=1, description="Long pieces only: send this finished section, counted from 1.")
        ] = None,
        follow: Annotated[
            bool,
            Query(
                description="Long pieces only: send the finished sections, then each later one as soon as it is "
                "finished; as MP3 if that is the job's format, otherwise as WAV of unknown length."
            ),
        ] = False,
    ) -> Response:
        """Download a job's audio. No key is needed, except for a job whose id the client chose.

        This also works for audio in a bucket, for clients that cannot reach the bucket (`download_url` leads there).
        """
        check_names(request, (), limits=service.settings.api, parameters=("section", "follow"))
        if follow and section is not None:
            message = "follow sends all sections: leave out follow or section"
            raise invalid("follow", message, value=follow, place="query")
        job = None if request.state.client is None else await jobs.get(_ref(request, job_id))
        job = _require(job or await jobs.find_unguessable(CONTRACT, JobId(job_id)))
        if section is not None:
            return await section_answer(service, request, job=job, number=section)
        if follow:
            return await follow_answer(service, request, job=job)
        if job.result is None:
            raise HTTPException(409, f"the job has no audio: it is {job.state}")
        file = job.result.file
        response = await file_answer(request, file, jobs=jobs, recipes=recipes_of(job) or ())
        response.headers.update(warning_headers(request, file.made_on))
        return response

    return links


def _ref(request: Request, job_id: str) -> JobRef:
    return JobRef(CONTRACT, request.state.client, JobId(job_id))


def _require(job: Job | None) -> Job:
    if job is None:
        raise HTTPException(404, "job not found")
    return job
