"""The interface for operators' requests: status, keeping models loaded, draining. `serving` implements it with Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from stable_audio_serve.core.catalog import ModelStatus

DrainState = Literal["no", "draining", "drained"]


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """The last report of one replica, `age_s` seconds old. Values that it did not report are None.

    `backlog_s` is the predicted device time of unfinished work. `rows_per_step` is the mean of the last ten seconds.
    `finished_per_minute` is the number of requests that finished in the minute before the report.
    """

    id: str
    age_s: float
    device: str | None = None
    dtype: str | None = None
    in_flight: int | None = None
    backlog_s: float | None = None
    rows_per_step: float | None = None
    finished_per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class ModelReport:
    """The replicas of one model. `is_kept` is true if an operator keeps the model loaded.

    `waiting_jobs_s` is the predicted device time of the model's waiting jobs in the job database; None = unknown.
    """

    status: ModelStatus
    is_kept: bool = False
    replicas: tuple[ReplicaReport, ...] = ()
    waiting_jobs_s: float | None = None


@dataclass(frozen=True, slots=True)
class DrainReport:
    """Whether the server drains, and the numbers of its unfinished requests and leased jobs; None = unknown."""

    state: DrainState = "no"
    num_requests: int | None = 0
    num_jobs: int | None = 0


@dataclass(frozen=True, slots=True)
class ServerReport:
    """The models by canonical name, as they were `age_s` seconds ago. `reason` explains an old or incomplete report."""

    models: Mapping[str, ModelReport]
    drain: DrainReport = field(default_factory=DrainReport)
    age_s: float = 0.0
    reason: str | None = None


class Operations(Protocol):
    """What operators can request of a server. Every method returns within a few seconds."""

    async def report(self) -> ServerReport:
        """Return the state of the server, about a second old. Calls within a second share one query."""
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
