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
        description="accelerated, or plain with the reason; then the speed features that are off."
    )
    memory_bytes: dict[str, int] | None = Field(
        description="Planned bytes of GPU memory for each purpose; empty on a CPU."
    )
    requests: int | None = Field(description="Number of its waiting and running requests.")
    backlog_s: float | None = Field(description="Predicted device time of its waiting and running requests, seconds.")
    rows_per_step: float | None = Field(
        description="Mean number of variations per denoising step in the last ten seconds; null without a step."
    )
    requests_per_minute: int | None = Field(
        description="Number of requests that it finished in the minute before its report."
    )
    age_s: float


class ServedModel(BaseModel):
    """One model and its replicas."""

    stage: str = Field(description="loading, ready, failed, idle (scaled to zero) or waking (from zero).")
    default: bool = Field(description="Whether requests without a model name get this model.")
    kept: bool = Field(description="Whether an operator keeps the model loaded.")
    min_replicas: int
    max_replicas: int
    states: dict[str, int] = Field(
        description="Number of replicas in each of Ray Serve's states, such as running or starting."
    )
    backlog_s: float = Field(description="Sum over its replicas, seconds.")
    rows_per_step: float | None = Field(description="Mean over its replicas.")
    waiting_jobs_s: float | None = Field(
        description="Predicted device time of the queued jobs for this model, seconds; null = unknown."
    )
    requests_per_minute: int = Field(
        description="Number of requests that its replicas finished in the last minute, those of jobs included."
    )
    replicas: list[Replica]


class Jobs(BaseModel):
    """The jobs in the database, which several servers may share. Unknown values are null."""

    store: JobStoreHealth
    queued: int | None
    running: int | None
    succeeded: int | None = Field(
        description="Number of succeeded jobs in the database. Failed, cancelled and this number may be 15 s old."
    )
    failed: int | None
    cancelled: int | None
    dead_letters: int | None = Field(
        description="Jobs whose attempts all failed because of the server. An operator can retry them."
    )
    waited_s: float | None = Field(description="Time that the oldest queued job has waited, seconds.")
    age_s: float | None = Field(description="Time since the jobs were counted, seconds.")
    reason: str | None = Field(description="Why numbers are missing or old.")


class Drain(BaseModel):
    """Whether an operator drains this server, and the work left to finish."""

    state: DrainState = Field(description="no, draining, or drained (all accepted work is finished).")
    requests: int | None = Field(description="Number of unfinished requests; null = unknown.")
    jobs: int | None = Field(description="Number of jobs that this server's runners hold; null = unknown.")


class ServerStatus(BaseModel):
    """The state of a server."""

    server: str
    version: str
    status: str = Field(description="As in /ready: ok, loading, failed, draining or keys.")
    ready: bool
    reasons: list[str] = Field(description="Why the server is not healthy; empty if it is.")
    draining: Drain
    backlog_s: float = Field(description="Predicted device time of the accepted requests of all replicas, seconds.")
    models: dict[str, ServedModel]
    jobs: Jobs
    age_s: float | None = Field(description="Time since the replicas were counted, seconds; null = never.")
    reason: str | None = Field(description="Why the replicas' numbers are missing or old.")


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

    number: int = Field(
        description="Number of the dead letter in the other routes. Its `id` is unique for one client only."
    )
    id: str
    contract: Contract
    client: str
    model: str
    priority: Priority
    prompt: str
    duration_s: float
    batch_size: int
    created_at: str = Field(description="ISO 8601 with UTC offset, like failed_at.")
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
    next_cursor: int | None = Field(description="Cursor of the next page; null = this is the last page.")


class LetterNumbers(BaseModel):
    """The numbers of the dead letters to change."""

    numbers: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(min_length=1, max_length=MOST_AT_ONCE)


class LettersDone(BaseModel):
    """The numbers of the changed dead letters, and the numbers without a dead letter."""

    done: list[int]
    not_found: list[int]
