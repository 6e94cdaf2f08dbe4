"""The life of a queued request as server-sent events: one per change, the last one says that it is over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response

from stable_audio_serve.api.compat.fal.queue import describe_status
from stable_audio_serve.api.compat.fal.wire import REQUEST_ID, Links
from stable_audio_serve.jobs.job import Job
from stable_audio_serve.jobs.queue import JobQueue

_FIRST_POLL_S = 0.1  # the job may run anywhere, so its store is asked, less often while nothing happens
_LAST_POLL_S = 0.5
_COMMENT_S = 10  # proxies and clients give a silent connection up after 15 s and more


def stream_status(jobs: JobQueue, job: Job, links: Links, *, with_logs: bool) -> Response:
    """The answer that follows the job to its end."""
    events = _follow(jobs, job, links, with_logs=with_logs)
    return EventSourceResponse(events, ping=_COMMENT_S, sep="\n", headers={REQUEST_ID: job.spec.id})


async def _follow(jobs: JobQueue, job: Job, links: Links, *, with_logs: bool) -> AsyncIterator[ServerSentEvent]:
    last_id = 0
    last_seen = None
    wait_s = _FIRST_POLL_S
    current: Job | None = job
    while current is not None:
        position = await jobs.position(current) if current.state == "queued" else 0
        wants_logs = with_logs and current.state != "queued"
        new_events = await jobs.events("fal", current.spec.id, after=last_id) if wants_logs else ()
        new_logs = [event for event in new_events if event.message]
        seen = (current.state, position)
        if seen != last_seen or new_logs:
            last_seen = seen
            wait_s = _FIRST_POLL_S
            last_id = max((event.id for event in new_events), default=last_id)
            body = describe_status(current, links, position=position, logs=new_logs if with_logs else None)
            yield ServerSentEvent(body.model_dump_json(ensure_ascii=True), sep="\n")
        if current.is_over:
            return
        await asyncio.sleep(wait_s)
        wait_s = min(wait_s * 1.5, _LAST_POLL_S)
        current = await jobs.get("fal", current.spec.id)
