"""The interface for operators' requests: status, keeping models loaded, draining. `serving` implements it with Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from stable_audio_serve.core.catalog import ModelQuality, ModelStatus

DrainState = Literal["no", "draining", "drained"]


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """The last report of one replica, `age_s` seconds old. Values that the replica did not report are None.

    `profile` is text: the name of the engine's profile, the reason for a plain profile, and the features that are off.
    `memory_bytes` maps each purpose of GPU memory to the bytes planned for it. `requests` is the number of unfinished
    requests, and `backlog_s` is their predicted device time. `rows_per_step` is the mean number of variations in a
    denoising step over the last ten seconds. `requests_per_minute` is the number of requests that finished in the
    minute before the report. `start_s` is the duration of each stage of the replica's start in seconds.
    """

    id: str
    age_s: float
    device: str | None = None
    dtype: str | None = None
    profile: str | None = None
    memory_bytes: Mapping[str, int] | None = None
    requests: int | None = None
    backlog_s: float | None = None
    rows_per_step: float | None = None
    requests_per_minute: int | None = None
    start_s: Mapping[str, float] = field(default_factory=dict)
    quality: ModelQuality | None = None


@dataclass(frozen=True, slots=True)
class ModelReport:
    """The replicas of one model, and its waiting jobs. `is_kept` is true if an operator keeps the model loaded.

    `waiting_jobs_s` is the predicted device time of the model's waiting jobs in the job database; None = unknown.
    """

    status: ModelStatus
    is_kept: bool = False
    replicas: tuple[ReplicaReport, ...] = ()
    waiting_jobs_s: float | None = None


@dataclass(frozen=True, slots=True)
class DrainReport:
    """Whether the server is draining. A draining server finishes its work and accepts no new work.

    `num_requests` is the number of unfinished requests, `num_jobs` the number of running jobs; None = unknown.
    """

    state: DrainState = "no"
    num_requests: int | None = 0
    num_jobs: int | None = 0


@dataclass(frozen=True, slots=True)
class ServerReport:
    """The state of the server `age_s` seconds ago. `models` has the models' reports by canonical name.

    If the report is old or incomplete, `reason` says why.
    """

    models: Mapping[str, ModelReport]
    drain: DrainReport = field(default_factory=DrainReport)
    age_s: float = 0.0
    reason: str | None = None


class Operations(Protocol):
    """The requests that operators can send to a server. Every method returns within a few seconds."""

    async def report(self) -> ServerReport:
        """Return the state of the server. The state may be 1 s old, because calls within 1 s share one query."""
        ...

    async def keep(self, model: str) -> None:
        """Keep a replica of the model with this canonical name loaded until `release`. Raises StorageError."""
        ...

    async def release(self, model: str) -> None:
        """Allow the model to scale down to its configured minimum again. Raises StorageError."""
        ...

    async def drain(self) -> None:
        """Accept no new work in any process of this server, until `resume`. Raises StorageError."""
        ...

    async def resume(self) -> None:
        """Accept work again. Raises StorageError."""
        ...
