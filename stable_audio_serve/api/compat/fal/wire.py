"""Request and response models of fal's queue and of its model `fal-ai/stable-audio`."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from stable_audio_serve.api.compat.hosted import DEFAULT_STEPS, MAX_S, START_DESCRIPTION, ClipInput, File, WholeNumber
from stable_audio_serve.api.description import error_responses
from stable_audio_serve.api.fields import IS_NONE

OWNER = "fal-ai"
APP = f"{OWNER}/stable-audio"
SA3_APP, SA25_APP = f"{APP}-3", f"{APP}-25"

REQUEST_ID = "X-Fal-Request-Id"
ERROR_TYPE = "X-Fal-Error-Type"
RETRYABLE = "X-Fal-Retryable"
TIMEOUT_TYPE = "X-Fal-Request-Timeout-Type"

# Headers that pages of other origins may read, in addition to the headers of the native API.
EXPOSED_HEADERS = (REQUEST_ID, ERROR_TYPE, RETRYABLE, TIMEOUT_TYPE)


_OPTIONAL = partial(Field, None, exclude_if=IS_NONE)  # absent if it has no value


class AudioInput(ClipInput):
    """Input of the model."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "128 BPM tech house drum loop"}]})

    seconds_start: WholeNumber = Field(0, ge=0, le=MAX_S, description=START_DESCRIPTION)
    steps: WholeNumber = Field(DEFAULT_STEPS, ge=2, le=1000, description="Denoising steps.")


class AudioOutput(BaseModel):
    """Output of `fal-ai/stable-audio`."""

    audio_file: File


class SeededOutput(BaseModel):
    """Output of Stable Audio 2.5."""

    audio: File
    seed: int


class PromptedOutput(SeededOutput):
    """Output of Stable Audio 3."""

    prompt: str


Output = AudioOutput | SeededOutput | PromptedOutput


class Links(BaseModel):
    """URLs of one request."""

    request_id: str
    response_url: str
    status_url: str
    cancel_url: str


class LogEntry(BaseModel):
    """One line of a request's log."""

    message: str
    level: str = "INFO"
    source: str = "USER"
    timestamp: str


class Metrics(BaseModel):
    """Duration of the generation, seconds."""

    inference_time: float | None


class Queued(Links):
    """A queued request. `queue_position` is the number of requests before it."""

    status: Literal["IN_QUEUE"] = "IN_QUEUE"
    queue_position: int


class Ticket(Queued):
    """Response to a submission."""

    gateway_request_id: str


class InProgress(Links):
    """A running request. `logs` is always present, because fal's clients read it in any case."""

    status: Literal["IN_PROGRESS"] = "IN_PROGRESS"
    logs: list[LogEntry] | None


class Completed(Links):
    """An ended request. It has an error if it failed or was cancelled."""

    status: Literal["COMPLETED"] = "COMPLETED"
    logs: list[LogEntry] | None
    metrics: Metrics
    error: str | None = _OPTIONAL()
    error_type: str | None = _OPTIONAL()


Status = Queued | InProgress | Completed


class CancelReply(BaseModel):
    """Result of a cancellation."""

    status: Literal["CANCELLATION_REQUESTED", "ALREADY_COMPLETED", "NOT_FOUND"]


class FalError(BaseModel):
    """Any error: a sentence, or a list with one entry per invalid field."""

    detail: str | list[dict[str, Any]]
    error_type: str | None = _OPTIONAL()


# Returns the `responses` of a FastAPI route for the statuses in the call.
errors = partial(error_responses, FalError)
