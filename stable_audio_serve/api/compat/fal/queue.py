"""Responses of fal's queue: tickets, statuses and cancellations. Each queued request is a job."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from stable_audio_serve.api.compat.fal.errors import failure_of
from stable_audio_serve.api.compat.fal.wire import (
    CancelReply,
    Completed,
    InProgress,
    Links,
    LogEntry,
    Metrics,
    Queued,
    Status,
    Ticket,
)
from stable_audio_serve.jobs.job import Job, JobEvent
from stable_audio_serve.jobs.queue import CancelOutcome

CANCEL_REPLIES: dict[CancelOutcome, tuple[int, CancelReply]] = {
    "removed": (202, CancelReply(status="CANCELLATION_REQUESTED")),
    "requested": (202, CancelReply(status="CANCELLATION_REQUESTED")),
    "already_over": (400, CancelReply(status="ALREADY_COMPLETED")),
    "unknown": (404, CancelReply(status="NOT_FOUND")),
}


def make_ticket(job: Job, links: Links, *, position: int) -> Ticket:
    """Return the response to the submission of a queued request: its id, its URLs and its place in the queue."""
    return Ticket(**links.model_dump(), gateway_request_id=job.spec.id, queue_position=position)


def describe_status(job: Job, links: Links, *, position: int, logs: Sequence[JobEvent] | None) -> Status:
    """Return the status of a job. `position` is its place in the queue. `logs` is None if no logs were requested."""
    if job.state == "queued":
        return Queued(**links.model_dump(), queue_position=position)
    entries = None if logs is None else [_describe_log(event.at, event.message) for event in logs if event.message]
    if not job.is_over:
        return InProgress(**links.model_dump(), logs=entries)
    metrics = Metrics(inference_time=job.result.inference_s if job.result else None)
    if job.state == "succeeded":
        return Completed(**links.model_dump(), logs=entries, metrics=metrics)
    failure = failure_of(job)
    return Completed(
        **links.model_dump(), logs=entries, metrics=metrics, error=failure.message, error_type=failure.error_type
    )


def _describe_log(at: datetime, message: str) -> LogEntry:
    return LogEntry(message=message, timestamp=_iso(at))


def _iso(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds")
