"""Reports and actions for operators, as the HTTP layer needs them. `serving` implements them with Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from stable_audio_serve.core.catalog import ModelStatus

DrainState = Literal["no", "draining", "drained"]


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """The report of one replica, `age_s` old. None = not reported.

    `backlog_s` is the predicted device time of unfinished work. `rows_per_step` is the mean over the replica's last
    seconds with steps. `finished_per_minute` is the number of requests that finished in the last minute.
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

    `waiting_jobs_s` is the predicted device time of all jobs in the database that wait for the model; None = unknown.
    """

    status: ModelStatus
    is_kept: bool = False
    replicas: tuple[ReplicaReport, ...] = ()
    waiting_jobs_s: float | None = None


@dataclass(frozen=True, slots=True)
class DrainReport:
    """Whether an operator drains this server, and the requests and leased jobs that it has yet to finish.

    A count is None if it is unknown at the moment.
    """

    state: DrainState = "no"
    num_requests: int | None = 0
    num_jobs: int | None = 0


@dataclass(frozen=True, slots=True)
class ServerReport:
    """The state of each model, by canonical name, `age_s` ago.

    If the state is incomplete or old, `reason` says why.
    """

    models: Mapping[str, ModelReport]
    drain: DrainReport = field(default_factory=DrainReport)
    age_s: float = 0.0
    reason: str | None = None


class Operations(Protocol):
    """The reports and actions for operators. Every method returns within a few seconds."""

    async def report(self) -> ServerReport:
        """Returns the server's state, about a second old. Frequent calls cost no more than one call a second."""
        ...

    async def keep(self, model: str) -> None:
        """Keep a replica of the model with this canonical name until `release`. Raises StorageError."""
        ...

    async def release(self, model: str) -> None:
        """Undo `keep`: allow the model's configured minimum number of replicas again. Raises StorageError."""
        ...

    async def drain(self) -> None:
        """Accept no new work in any process of this server, until `resume`. Raises StorageError."""
        ...

    async def resume(self) -> None:
        """Accept work again. Raises StorageError."""
        ...
