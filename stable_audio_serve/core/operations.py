"""What the HTTP layer tells operators, and does for them, beyond single requests; `serving` implements it over Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from stable_audio_serve.core.catalog import ModelStatus

DrainState = Literal["no", "draining", "drained"]


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What one replica of a model said `age_s` ago; None = it did not say.

    `backlog_s` is predicted device time not yet spent, `rows_per_step` the mean of its last seconds with steps,
    `finished_per_minute` how many requests had their audio in the minute before.
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
    """One model's replicas; `is_kept`: an operator keeps it loaded.

    `waiting_jobs_s` is the predicted device time of all jobs that wait for it in the job database; None = not known.
    """

    status: ModelStatus
    is_kept: bool = False
    replicas: tuple[ReplicaReport, ...] = ()
    waiting_jobs_s: float | None = None


@dataclass(frozen=True, slots=True)
class DrainReport:
    """Whether an operator takes this server out, and what is left to finish: requests, and jobs that it leases.

    None = not known now.
    """

    state: DrainState = "no"
    num_requests: int | None = 0
    num_jobs: int | None = 0


@dataclass(frozen=True, slots=True)
class ServerReport:
    """The models by canonical name, as they were `age_s` ago; `reason` says why they are not known better."""

    models: Mapping[str, ModelReport]
    drain: DrainReport = field(default_factory=DrainReport)
    age_s: float = 0.0
    reason: str | None = None


class Operations(Protocol):
    """What operators see and do. Every method answers within a few seconds."""

    async def report(self) -> ServerReport:
        """Returns what the server does, about a second old; asking often costs no more than asking once a second."""
        ...

    async def keep(self, model: str) -> None:
        """Keep a replica of the model with this canonical name until `release`. Raises StorageError."""
        ...

    async def release(self, model: str) -> None:
        """Let the model go to its configured least number of replicas. Raises StorageError."""
        ...

    async def drain(self) -> None:
        """Accept no new work in any process of this server, until `resume`. Raises StorageError."""
        ...

    async def resume(self) -> None:
        """Accept work again. Raises StorageError."""
        ...
