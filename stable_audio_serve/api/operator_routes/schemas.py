"""Response models of the operator routes: the state of the server, and dead letters."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from stable_audio_serve.api.shared_routes.info import JobStoreHealth
from stable_audio_serve.core.generation import Priority
from stable_audio_serve.core.operations import DrainState
from stable_audio_serve.jobs.job import Contract

MOST_AT_ONCE = 500

_LETTER: dict[str, Any] = {
    "number": 4711,
    "id": "68e48e7af36c4d829e3797a0b3e7687c",
    "contract": "sa3",
    "client": "studio",
    "model": "small-sfx",
    "priority": "interactive",
    "prompt": "a door closes",
    "duration_s": 10.0,
    "batch_size": 1,
    "created_at": "2026-11-20T14:00:00.125000+00:00",
    "failed_at": "2026-11-20T14:03:10.250000+00:00",
    "attempts": 3,
    "error": {"code": "unavailable", "message": "model small-sfx lost its replica twice while working on this request"},
}


class Replica(BaseModel):
    """The report of one replica, `age_s` seconds old. Values that it did not report are null."""

    id: str
    device: str | None
    dtype: str | None = Field(description="Precision of the denoiser.")
    profile: str | None = Field(
        description="Of the engine's speed features: accelerated, or plain and the reason; then features that are off."
    )
    memory_bytes: dict[str, int] | None = Field(description="Plan of the GPU's memory by purpose; empty on a CPU.")
    requests: int | None = Field(description="In it now, waiting or at work.")
    backlog_s: float | None = Field(description="Predicted device time of what it has accepted, seconds.")
    rows_per_step: float | None = Field(
        description="Variations that shared a denoising step, mean of its last ten seconds; null without a step."
    )
    requests_per_minute: int | None = Field(description="Finished in the minute before it said so.")
    age_s: float


class ServedModel(BaseModel):
    """One model and its replicas."""

    stage: str = Field(description="loading, ready, failed, idle (scaled to zero) or waking (from zero).")
    default: bool = Field(description="Of requests that name no model.")
    kept: bool = Field(description="An operator keeps it loaded.")
    min_replicas: int
    max_replicas: int
    states: dict[str, int] = Field(description="Replicas by Ray Serve's words: running, starting, stopping ...")
    backlog_s: float = Field(description="Of all its replicas, seconds.")
    rows_per_step: float | None = Field(description="Mean of its replicas.")
    waiting_jobs_s: float | None = Field(
        description="Predicted device time of the jobs that wait for it in the job database, seconds; null: not known."
    )
    requests_per_minute: int = Field(
        description="Finished in the last minute by all replicas there are, also those on CPUs; requests of jobs count."
    )
    replicas: list[Replica]


class Jobs(BaseModel):
    """The jobs in the database, which several servers may share. Unknown values are null."""

    store: JobStoreHealth
    queued: int | None
    running: int | None
    succeeded: int | None = Field(description="Of those that are kept, as are the next two; up to 15 s old.")
    failed: int | None
    cancelled: int | None
    dead_letters: int | None = Field(description="Failed by no fault of their own; an operator may retry them.")
    waited_s: float | None = Field(description="How long the first job that waits has been due, seconds.")
    age_s: float | None = Field(description="Seconds since they were counted.")
    reason: str | None = Field(description="Why they are not known better.")


class Drain(BaseModel):
    """Whether an operator drains this server, and the work left to finish."""

    state: DrainState = Field(description="no, draining, or drained: all that was begun is finished.")
    requests: int | None = Field(description="Begun before and not finished; null: not known now.")
    jobs: int | None = Field(description="Leased by this server's runners; null: not known now.")


class ServerStatus(BaseModel):
    """The state of a server."""

    server: str
    version: str
    status: str = Field(description="As in /health: ok, loading, failed or draining.")
    ready: bool
    reasons: list[str] = Field(description="Why not.")
    draining: Drain
    backlog_s: float = Field(description="Predicted device time of what all replicas have accepted, seconds.")
    models: dict[str, ServedModel]
    jobs: Jobs
    age_s: float | None = Field(description="Seconds since the replicas were counted; null: never.")
    reason: str | None = Field(description="Why they are not known better.")


class KeptModel(BaseModel):
    """A model, and whether an operator keeps it loaded."""

    model: str
    kept: bool
    stage: str = Field(description="As in /v1/status.")


class LetterError(BaseModel):
    """The error of a job's last attempt."""

    code: str
    message: str


class DeadLetter(BaseModel):
    """A job whose attempts all failed because of the server."""

    model_config = ConfigDict(json_schema_extra={"examples": [_LETTER]})

    number: int = Field(description="What the other routes know it by: ids are unique per client only.")
    id: str
    contract: Contract
    client: str
    model: str
    priority: Priority
    prompt: str
    duration_s: float
    batch_size: int
    created_at: str = Field(description="ISO 8601 with UTC offset, as the other time.")
    failed_at: str | None
    attempts: int
    error: LetterError | None


class LetterEvent(BaseModel):
    """One event in the history of a job."""

    at: str
    stage: str
    fraction: float
    message: str | None


class DeadLetterDetails(DeadLetter):
    """A dead letter and its events."""

    events: list[LetterEvent]


class DeadLetterPage(BaseModel):
    """A page of dead letters, newest first."""

    dead_letters: list[DeadLetter]
    next_cursor: int | None = Field(description="Leads to the next page; null = there are no older ones.")


class LetterNumbers(BaseModel):
    """The numbers of the dead letters to change."""

    numbers: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(min_length=1, max_length=MOST_AT_ONCE)


class LettersDone(BaseModel):
    """The numbers of the changed dead letters, and the numbers without a dead letter."""

    done: list[int]
    not_found: list[int]
