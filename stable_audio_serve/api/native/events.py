"""A job's progress as an event stream: past events, new events and the final status."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Header
from pydantic import BaseModel, Field
from sse_starlette import ServerSentEvent

from stable_audio_serve.api.native.status import JobProgress, describe, iso, progress_of
from stable_audio_serve.api.streams import Change, EventStreams
from stable_audio_serve.jobs.job import Job, JobEvent
from stable_audio_serve.jobs.queue import JobQueue

END = "end"  # type and id of the last event of a stream
EXAMPLE = (
    'id: 17\nevent: progress\ndata: {"stage":"denoising","fraction":0.45,"eta_seconds":2.1,"queue_position":null,'
    '"message":null,"at":"2026-11-20T14:00:01.250000+00:00"}\n\n'
)

LastEventId = Annotated[
    str | None,
    Header(
        alias="Last-Event-ID",
        pattern=f"^([0-9]{{1,18}}|{END})$",
        description="Id of the last received event; the stream continues after it.",
    ),
]


class JobProgressEvent(JobProgress):
    """The data of a `progress` event."""

    message: str | None = Field(description="A log line for the client.")
    at: str | None = Field(description="Time of the event; null = current state.")


async def stream_events(
    jobs: JobQueue, job: Job, *, base: str, after: int, streams: EventStreams
) -> AsyncIterator[ServerSentEvent]:
    """Yield `progress` events after event id `after`, then one `end` event with the job's status."""
    async for change in streams.follow(jobs, job, after=after):
        for event in change.events:
            yield _sse(_of_event(event, change.job), kind="progress", event_id=str(event.id))
        if change.job.is_over:
            status = await asyncio.to_thread(describe, change.job, jobs.artifacts, base=base)
            yield _sse(status, kind=END, event_id=END)
        elif change.position is not None or not change.events:
            yield _sse(_of_now(change), kind="progress")


def _of_event(event: JobEvent, job: Job) -> JobProgressEvent:
    return JobProgressEvent(
        stage=event.stage,
        fraction=event.fraction,
        sections_done=event.num_sections if job.spec.sections else None,
        sections=len(job.spec.sections) or None,
        eta_seconds=event.eta_s,
        queue_position=None,
        message=event.message,
        at=iso(event.at),
    )


def _of_now(change: Change) -> JobProgressEvent:
    """Return the current progress as an event that is sent without an id, because it is not a stored event."""
    progress = progress_of(change.job, position=change.position)
    return JobProgressEvent(**progress.model_dump(), message=None, at=None)


def _sse(body: BaseModel, *, kind: str, event_id: str | None = None) -> ServerSentEvent:
    return ServerSentEvent(body.model_dump_json(ensure_ascii=True), event=kind, id=event_id, sep="\n")
