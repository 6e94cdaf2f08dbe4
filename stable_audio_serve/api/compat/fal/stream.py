"""The status of a queued request as server-sent events: one event per change. The last event has status COMPLETED."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

from sse_starlette import ServerSentEvent

from stable_audio_serve.api.compat.fal.queue import describe_status
from stable_audio_serve.api.compat.fal.wire import Links
from stable_audio_serve.api.streams import Change, EventStreams
from stable_audio_serve.jobs.job import Job, JobEvent, State
from stable_audio_serve.jobs.queue import JobQueue


async def stream_status(
    jobs: JobQueue, job: Job, *, links: Links, with_logs: bool, streams: EventStreams
) -> AsyncIterator[ServerSentEvent]:
    """Yield an event for each change of a request's status, until the request ends. `with_logs` adds new log lines."""
    sent: tuple[State, int | None] | None = None
    unsent_logs: list[JobEvent] = []
    async for change in streams.follow(jobs, job):
        unsent_logs += [event for event in change.events if event.message]
        for current in _steps(change, since=sent[0] if sent else None):
            position = change.position if current.state == "queued" else None
            logs = unsent_logs if with_logs and current.state != "queued" else []
            if (current.state, position) == sent and not logs:
                continue
            sent = (current.state, position)
            status = describe_status(current, links, position=position or 0, logs=logs if with_logs else None)
            yield ServerSentEvent(status.model_dump_json(ensure_ascii=True), sep="\n")
            if logs:
                unsent_logs = []


def _steps(change: Change, *, since: State | None) -> list[Job]:
    """Return the job in each state to report, in order. `since` is the state that was reported last.

    If a queued job has started and ended since then, it is reported as running before its final state.
    """
    job = change.job
    if since == "queued" and job.is_over and job.started_at is not None:
        return [replace(job, state="running"), job]
    return [job]
