"""The operations of operators that the HTTP layer offers: status, keeping models loaded, draining. `serving` implements
them with Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from stable_audio_serve.core.catalog import ModelStatus

DrainState = Literal["no", "draining", "drained"]


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """The last report of one replica, `age_s` old. None = not reported.

    `backlog_s` is the predicted device time of unfinished work, `rows_per_step` a mean of the last ten seconds,
    `finished_per_minute` the number of requests finished in the minute before the report.
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
    """The replicas of one model. `is_kept`: an operator keeps the model loaded.

    `waiting_jobs_s` is the predicted device time of all jobs that wait for it in the job database; None = not known.
    """

    status: ModelStatus
    is_kept: bool = False
    replicas: tuple[ReplicaReport, ...] = ()
    waiting_jobs_s: float | None = None


@dataclass(frozen=True, slots=True)
class DrainReport:
    """Whether the server drains, and its unfinished requests and leased jobs. None = unknown."""

    state: DrainState = "no"
    num_requests: int | None = 0
    num_jobs: int | None = 0


@dataclass(frozen=True, slots=True)
class ServerReport:
    """The models by canonical name, `age_s` ago. `reason` explains an old or incomplete report."""

    models: Mapping[str, ModelReport]
    drain: DrainReport = field(default_factory=DrainReport)
    age_s: float = 0.0
    reason: str | None = None


class Operations(Protocol):
    """The operations of operators. Every method returns within a few seconds."""

    async def report(self) -> ServerReport:
        """Returns the state of the server, about a second old. Frequent calls share one query a second."""
        ...

    async def keep(self, model: str) -> None:
        """Keep a replica of the model with this canonical name until `release`. Raises StorageError."""
        ...

    async def release(self, model: str) -> None:
        """Let the model scale down to its configured minimum. Raises StorageError."""
        ...

    async def drain(self) -> None:
        """Accept no new work in any process of this server, until `resume`. Raises StorageError."""
        ...

    async def resume(self) -> None:
        """Accept work again. Raises StorageError."""
        ...
