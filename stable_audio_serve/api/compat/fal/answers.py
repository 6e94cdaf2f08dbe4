"""Answers about a request: its output, the status of a queued request, once or as a stream, and its webhook."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sse_starlette import ServerSentEvent

from stable_audio_serve.api.compat.fal.errors import failure_of
from stable_audio_serve.api.compat.fal.wire import (
    SA3_APP,
    SA25_APP,
    AudioOutput,
    Completed,
    InProgress,
    Links,
    LogEntry,
    Metrics,
    Output,
    PromptedOutput,
    Queued,
    SeededOutput,
    Status,
)
from stable_audio_serve.api.compat.hosted import File
from stable_audio_serve.api.links import file_url
from stable_audio_serve.api.streams import Change, EventStreams
from stable_audio_serve.jobs.job import Job, JobEvent, JobResult, State
from stable_audio_serve.jobs.queue import JobQueue


def describe_output(file: File, app: str | None, *, seed: int, prompt: str) -> Output:
    """Return the output in the format of the application `app`, None = `fal-ai/stable-audio`."""
    if app == SA3_APP:
        return PromptedOutput(audio=file, seed=seed, prompt=prompt)
    return SeededOutput(audio=file, seed=seed) if app == SA25_APP else AudioOutput(audio_file=file)


def describe_result(job: Job, result: JobResult, *, url: str) -> Output:
    """Return the output of a finished queued request, whose file is at `url`."""
    file, spec = File.of(result.file, url=url), job.spec
    return describe_output(file, spec.wire.get("app"), seed=result.seeds[0], prompt=spec.request.prompt)


def data_uri(content: bytes, media_type: str) -> str:
    """Return a file as a data URI."""
    return f"data:{media_type};base64,{b64encode(content).decode()}"


def webhook_body(job: Job) -> Mapping[str, Any]:
    """Return the webhook body of an ended job: its output, or the same error as on the result route.

    Links begin with the host name that the client used when it submitted the job.
    """
    ids = {"request_id": job.spec.id, "gateway_request_id": job.spec.id}
    if job.result is None:
        failure = failure_of(job)
        return {**ids, "status": "ERROR", "payload": failure.body, "error": failure.message}
    output = describe_result(job, job.result, url=file_url(job.spec.wire["base_url"], job.result))
    return {**ids, "status": "OK", "payload": output.model_dump()}


def describe_status(job: Job, links: Links, *, position: int, logs: Sequence[JobEvent] | None) -> Status:
    """Return the status of a job. `position` is its place in the queue. `logs` is None if no logs were requested."""
    urls = links.model_dump()
    if job.state == "queued":
        return Queued(**urls, queue_position=position)
    lines = None if logs is None else [_describe_log(event, job) for event in logs if event.message]
    if not job.is_over:
        return InProgress(**urls, logs=lines)
    metrics = Metrics(inference_time=job.result.inference_s if job.result else None)
    if job.state == "succeeded":
        return Completed(**urls, logs=lines, metrics=metrics)
    failure = failure_of(job)
    return Completed(**urls, logs=lines, metrics=metrics, error=failure.message, error_type=failure.error_type)


def _describe_log(event: JobEvent, job: Job) -> LogEntry:
    level = "ERROR" if job.error and event.message == job.error.message else "INFO"  # the last line of a failed job
    return LogEntry(message=event.message, level=level, timestamp=event.at.isoformat(timespec="milliseconds"))


async def stream_status(
    jobs: JobQueue, job: Job, *, links: Links, with_logs: bool, streams: EventStreams
) -> AsyncIterator[ServerSentEvent]:
    """Yield an event for each change of a request's status, until the request ends. `with_logs` adds new log lines."""
    sent: tuple[State, int | None] | None = None
    unsent_logs: list[JobEvent] = []
    async for change in streams.follow(jobs, job, finishes=True):  # fal's JavaScript client does not reconnect
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
