"""The wire forms of fal's queue and of its model `fal-ai/stable-audio`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from stable_audio_serve.api.compat.hosted import (
    DEFAULT_STEPS,
    MAX_S,
    START_DESCRIPTION,
    ClipInput,
    WholeNumber,
)

APP = "fal-ai/stable-audio"

REQUEST_ID = "X-Fal-Request-Id"
ERROR_TYPE = "X-Fal-Error-Type"
RETRYABLE = "X-Fal-Retryable"
TIMEOUT_TYPE = "X-Fal-Request-Timeout-Type"

# What a page on another origin may read, besides our own dialect's headers.
EXPOSED_HEADERS = (REQUEST_ID, ERROR_TYPE, RETRYABLE, TIMEOUT_TYPE)


def _is_none(value: object) -> bool:
    return value is None


class AudioInput(ClipInput):
    """Input of the model."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "128 BPM tech house drum loop"}]})

    seconds_start: WholeNumber = Field(0, ge=0, le=MAX_S, description=START_DESCRIPTION)
    steps: WholeNumber = Field(DEFAULT_STEPS, ge=2, le=1000, description="Denoising steps.")


class File(BaseModel):
    """A stored file; the URL needs no key."""

    url: str
    content_type: str
    file_name: str
    file_size: int


class AudioOutput(BaseModel):
    """Output of the model."""

    audio_file: File


class Links(BaseModel):
    """Where to ask about one request."""

    request_id: str
    response_url: str
    status_url: str
    cancel_url: str


class Ticket(Links):
    """What a submission is answered with."""

    status: Literal["IN_QUEUE"] = "IN_QUEUE"
    gateway_request_id: str
    queue_position: int


class LogEntry(BaseModel):
    """One line of a request's log."""

    message: str
    level: str = "INFO"
    source: str = "USER"
    timestamp: str


class Metrics(BaseModel):
    """How long the model worked, seconds."""

    inference_time: float | None


class Queued(Links):
    """Waits to run; position 0 is next."""

    status: Literal["IN_QUEUE"] = "IN_QUEUE"
    queue_position: int


class InProgress(Links):
    """Runs. Clients read `logs` also where they asked for none."""

    status: Literal["IN_PROGRESS"] = "IN_PROGRESS"
    logs: list[LogEntry] | None


class Completed(Links):
    """Over, well or not: only a failed or cancelled request has an error."""

    status: Literal["COMPLETED"] = "COMPLETED"
    logs: list[LogEntry] | None
    metrics: Metrics
    error: str | None = Field(None, exclude_if=_is_none)
    error_type: str | None = Field(None, exclude_if=_is_none)


Status = Queued | InProgress | Completed


class CancelReply(BaseModel):
    """What became of the wish to cancel."""

    status: Literal["CANCELLATION_REQUESTED", "ALREADY_COMPLETED", "NOT_FOUND"]


class FalError(BaseModel):
    """Any error: a sentence, or a list with one entry per field at fault."""

    detail: str | list[dict[str, Any]]
    error_type: str | None = Field(None, exclude_if=_is_none)
