"""How many jobs a runner leases at a time: for each model, as much predicted work as its replicas do in a given time.

The prediction uses the prices that the model's engines publish. Pure bookkeeping.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from math import inf
from types import MappingProxyType

from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.generation import Priority
from stable_audio_serve.core.pricing import Prices, WorkSize

_JOBS_WITHOUT_PRICES = 4  # per replica


@dataclass(slots=True)
class _RunningJob:
    model: str
    priority: Priority
    size: WorkSize
    done: float = 0.0  # the share of the work, 0..1
    is_working: bool = False  # an engine has started it


class Capacity:
    """Counts the jobs that one runner runs and says whether it should lease more; `key` is any name of a job.

    Each priority has its own room, so that neither keeps the other from the engines, which decide which runs first.
    """

    def __init__(
        self,
        models: Collection[str],
        *,
        prices: Callable[[str], Prices | None],
        ahead_s: Mapping[Priority, float],
        max_running: int,
        most_ahead_s: Mapping[str, float] = MappingProxyType({}),
        clock: Clock = SystemClock(),
    ) -> None:
        """Bounds per priority: `ahead_s` seconds of predicted work for each replica of a model, or less where
        `most_ahead_s` has less for the model, and `max_running` jobs.

        `prices` returns the last prices of a model, None before a replica has published them.
        """
        self._prices = prices
        self._most_ahead_s = most_ahead_s
        self._ahead_s = ahead_s
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

    def opens_in_s(self) -> float | None:
        """Returns the seconds until the next closed model opens; None when no model is closed."""
        now = self._clock.monotonic()
        return min((until - now for until in self._closed_until.values() if until > now), default=None)

    def begin(self, key: Hashable, *, model: str, priority: Priority, size: WorkSize) -> None:
        """Count a job that was leased."""
        self._running[key] = _RunningJob(model, priority, size)

    def advance(self, key: Hashable, *, done: float) -> None:
        """Note that an engine works on the job and has done this share of it, 0..1."""
        job = self._running[key]
        job.done, job.is_working = done, done < 1.0

    def end(self, key: Hashable) -> None:
        """Count the job no longer."""
        del self._running[key]

    def predict_end_s(self, key: Hashable) -> float | None:
        """Returns the seconds until a running job is done; one that waits ends after the jobs before it. None without
        prices.
        """
        job = self._running[key]
        if job.is_working or job.done >= 1.0:
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
        return not jobs or backlog_s < min(self._ahead_s[priority], self._most_ahead_s.get(model, inf))

    def _predict_s(self, model: str, jobs: Collection[_RunningJob], *, num_replicas: int) -> float | None:
        """Returns the predicted seconds until these jobs are done; None without prices."""
        prices = self._prices(model)
        if prices is None:
            return None
        return sum(prices.of(job.size) * (1.0 - job.done) for job in jobs) / 1000.0 / num_replicas

    def _of(self, model: str) -> list[_RunningJob]:
        return [job for job in self._running.values() if job.model == model]
