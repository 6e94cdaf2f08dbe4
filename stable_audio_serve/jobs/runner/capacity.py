"""Whether a runner leases another job: while the engines have room for it, and its file can be kept.

Engines have room for as much predicted work as the replicas of a model do in a given time, by the prices that the
engines publish. A job whose file is refused has been computed for nothing: after a refusal no job is started until as
much can be written as was refused, however long that takes; then one job, and all others once its file was kept.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from types import MappingProxyType

import structlog

from stable_audio_serve.artifacts.store import ArtifactStore
from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.core.generation import Priority
from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.core.pricing import Prices, WorkSize
from stable_audio_serve.jobs.store.health import Refusals, health_of

log = structlog.get_logger("stable_audio_serve.jobs")

# Predicted work that a runner hands to each model replica at a time, seconds; one job at least. Interactive work passes
# batch work, so little of that suffices.
_AHEAD_S: Mapping[Priority, float] = {"interactive": 30.0, "batch": 5.0}
# Of a model's target wait: jobs that an engine has already count for its replicas, but a new replica does not get them.
_AHEAD_SHARE = 0.5
_JOBS_WITHOUT_PRICES = 4  # per replica
_GRACE_S = 60.0  # how long a probe may take before other processes forget the refusal


@dataclass(slots=True)
class _RunningJob:
    model: str
    priority: Priority
    size: WorkSize
    done: float = 0.0  # the share of the work, 0..1
    is_working: bool = False  # an engine has started it


class Capacity:
    """Counts the jobs that one runner runs and says whether the engines have room for more; `key` is any name of a job.

    Each priority has its own room: both always have jobs in the engines, which decide what runs first.
    """

    def __init__(
        self,
        models: Collection[str],
        *,
        prices: Callable[[str], Prices | None],
        max_running: int,
        target_wait_s: Mapping[str, float] = MappingProxyType({}),
        clock: Clock = SystemClock(),
    ) -> None:
        """At most `max_running` jobs of each priority run. `target_wait_s` is what autoscaling aims at, by model.

        `prices` returns the last prices of a model, None before a replica has published them.
        """
        self._prices = prices
        self._target_wait_s = target_wait_s
        self._max_running = max_running
        self._clock = clock
        self._running: dict[Hashable, _RunningJob] = {}
        self._replicas = dict.fromkeys(models, 1)
        self._closed_until = dict.fromkeys(models, float("-inf"))

    @property
    def num_running(self) -> int:
        """The number of jobs in progress, of all models and priorities."""
        return len(self._running)

    def set_replicas(self, replicas: Mapping[str, int]) -> None:
        """Set how many replicas are ready. A model with none counts as one: a request starts it."""
        for model in self._replicas:
            self._replicas[model] = max(1, replicas.get(model, 1))

    def open_models(self, priority: Priority) -> Collection[str] | None:
        """Returns the models of which another job may be leased; None means all, including unknown ones."""
        if sum(job.priority == priority for job in self._running.values()) >= self._max_running:
            return ()
        models = [model for model in self._replicas if self._has_room(model, priority)]
        return None if len(models) == len(self._replicas) else models

    def close(self, model: str, *, for_s: float) -> None:
        """Lease no more jobs of a model for `for_s` seconds."""
        if model in self._closed_until:
            self._closed_until[model] = max(self._closed_until[model], self._clock.monotonic() + for_s)

    def begin(self, key: Hashable, *, model: str, priority: Priority, size: WorkSize) -> None:
        """Count a job that was leased."""
        self._running[key] = _RunningJob(model, priority, size)

    def advance(self, key: Hashable, *, done: float) -> None:
        """Note that an engine works on the job and has done this share of it, 0..1."""
        job = self._running[key]
        job.done, job.is_working = done, True

    def end(self, key: Hashable) -> None:
        """Count the job no longer."""
        del self._running[key]

    def predict_end_s(self, key: Hashable) -> float | None:
        """Returns the seconds until a running job is done; None without prices.

        A job that waits in an engine ends after the jobs before it.
        """
        job = self._running[key]
        if job.is_working:
            return self._predict_s(job.model, [job], num_replicas=1)
        ahead = [other for other in self._of(job.model) if job.priority in (other.priority, "batch")]
        return self._predict_s(job.model, ahead, num_replicas=self._replicas.get(job.model, 1))

    def _has_room(self, model: str, priority: Priority) -> bool:
        if self._closed_until[model] > self._clock.monotonic():
            return False
        jobs = [job for job in self._of(model) if job.priority == priority]
        backlog_s = self._predict_s(model, jobs, num_replicas=self._replicas[model])
        if backlog_s is None:
            return len(jobs) < _JOBS_WITHOUT_PRICES * self._replicas[model]
        return not jobs or backlog_s < min(_AHEAD_S[priority], _AHEAD_SHARE * self._target_wait_s.get(model, inf))

    def _predict_s(self, model: str, jobs: Collection[_RunningJob], *, num_replicas: int) -> float | None:
        """Returns the predicted seconds until these jobs are done; None without prices."""
        prices = self._prices(model)
        if prices is None:
            return None
        return sum(prices.of(job.size) * (1.0 - job.done) for job in jobs) / 1000.0 / num_replicas

    def _of(self, model: str) -> list[_RunningJob]:
        return [job for job in self._running.values() if job.model == model]


class StorageGate:
    """Closed while the place for files refuses them. One runner's; belongs to its event loop."""

    def __init__(
        self,
        artifacts: ArtifactStore,
        refusals: Refusals,
        *,
        owner: str,
        metrics: Metrics,
        on_open: Callable[[], None],
        first_probe_s: float,
        last_probe_s: float,
    ) -> None:
        """`on_open` is called when more jobs may be started than before.

        The place is tried again after `first_probe_s` seconds at most, which doubles with each refusal.
        """
        self._artifacts = artifacts
        self._refusals = refusals
        self._owner = owner
        self._metrics = metrics
        self._on_open = on_open
        self._first_probe_s = self._pause_s = first_probe_s
        self._last_probe_s = last_probe_s
        self._needed_bytes = 0
        self._is_proven = True  # the last file was kept
        self._probing: asyncio.Task[None] | None = None

    def admits(self, num_running: int) -> bool:
        """Whether another job may be started while `num_running` jobs run."""
        return self._probing is None and (self._is_proven or num_running == 0)

    def refused(self, error: StorageError, *, num_bytes: int) -> None:
        """Note that a file of `num_bytes` could not be kept or, with 0, that a kept one could not be read."""
        self._is_proven = False
        self._needed_bytes = max(self._needed_bytes, num_bytes)
        if self._probing is None:
            self._probing = asyncio.create_task(self._probe_until_kept(error))

    def kept(self) -> None:
        """Note that a file was kept."""
        if self._probing is None and not self._is_proven:
            self._is_proven = True
            self._pause_s = self._first_probe_s
            self._on_open()

    async def close(self) -> None:
        """Stop trying, and withdraw the refusal that other processes see."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)
            await self._withdraw()

    async def _probe_until_kept(self, error: StorageError) -> None:
        """Probe until a file as large as the refused ones can be written."""
        log.error("no jobs are started: files cannot be kept", reason=error.message, num_bytes=self._needed_bytes)
        self._metrics.gauge("job_files_refused", 1.0)
        refused: StorageError | None = error
        while refused is not None:
            pause_s = self._pause_s * random.uniform(0.5, 1.0)
            self._pause_s = min(2 * self._pause_s, self._last_probe_s)
            with suppress(StorageError):  # the database may be full too, which health checks notice by themselves
                health = health_of(refused)
                await asyncio.to_thread(self._refusals.note, self._owner, health, for_s=pause_s + _GRACE_S)
            await asyncio.sleep(pause_s)
            refused = await self._probe()
        log.warning("jobs are started again: files can be kept")
        self._metrics.gauge("job_files_refused", 0.0)
        await self._withdraw()
        self._needed_bytes, self._probing = 0, None
        self._on_open()

    async def _probe(self) -> StorageError | None:
        try:
            await self._artifacts.probe(self._needed_bytes)
        except StorageError as error:
            return error
        return None

    async def _withdraw(self) -> None:
        with suppress(StorageError):  # the refusal expires
            await asyncio.to_thread(self._refusals.withdraw, self._owner)
