"""How many jobs a runner leases at a time: of each model as much predicted work as its replicas finish in a given time.

Work is counted in seconds of audio x evaluations of the network, of all variations. The cost of a unit of work is
learnt from jobs that end, as throughput: the time a replica was busy divided by the work it did, so that batching
counts. Pure bookkeeping.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from math import inf
from types import MappingProxyType

from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.generation import GenerationRequest, Priority
from stable_audio_serve.core.pricing import WorkSize

_KEPT = 0.9  # the weight of earlier jobs, for each job that ends
_APART = 0.1  # jobs ended together unless this share of their expected time lay between their ends
_JOBS_BEFORE_LEARNT = 4  # per replica
_LEAST_BUSY_S = 1e-6


def work_of(request: GenerationRequest, card: ModelCard) -> float:
    """Returns seconds of audio x evaluations of the network, see `WorkSize`."""
    return WorkSize.of(request, model=card).evaluated_s


@dataclass(slots=True)
class _RunningJob:
    model: str
    priority: Priority
    work: float
    done: float = 0.0  # the share of the work, 0..1
    is_working: bool = False  # whether an engine has begun with it and not ended

    @property
    def work_left(self) -> float:
        return self.work * (1.0 - self.done)


@dataclass(slots=True)
class _Speed:
    """Decaying sums of replica time spent and work done with it."""

    busy_s: float = 0.0
    work: float = 0.0
    unaccounted_s: float = 0.0  # replica time spent since a job last ended
    since: float = 0.0

    def add(self, work: float) -> None:
        """Count a job that ended. Of several that end together only the first reduces the weight of earlier ones."""
        expected_s = self.predict_s(work)
        keep = _KEPT ** min(1.0, self.unaccounted_s / (_APART * expected_s)) if expected_s else 1.0
        self.busy_s = self.busy_s * keep + max(self.unaccounted_s, _LEAST_BUSY_S)
        self.work = self.work * keep + work
        self.unaccounted_s = 0.0

    def predict_s(self, work: float) -> float | None:
        """Returns the seconds that a replica takes for this work; None while nothing is known."""
        return self.busy_s / self.work * work if self.work else None


class Capacity:
    """Counts the jobs that one runner runs and says whether it should lease more; `key` is any name of a job.

    Each priority has room of its own, so that neither keeps the other from the engines, which decide which runs first.
    """

    def __init__(
        self,
        models: Collection[str],
        *,
        ahead_s: Mapping[Priority, float],
        max_running: int,
        most_ahead_s: Mapping[str, float] = MappingProxyType({}),
        clock: Clock = SystemClock(),
    ) -> None:
        """Bounds per priority: `ahead_s` seconds of predicted work for each replica of a model, or what `most_ahead_s`
        has for that model if it is less, and `max_running` jobs.
        """
        self._most_ahead_s = most_ahead_s
        self._ahead_s = ahead_s
        self._max_running = max_running
        self._clock = clock
        self._running: dict[Hashable, _RunningJob] = {}
        self._speeds = {model: _Speed() for model in models}
        self._replicas = dict.fromkeys(models, 1)
        self._closed_until = dict.fromkeys(models, float("-inf"))

    @property
    def num_running(self) -> int:
        """The number of jobs in progress, of all models and priorities."""
        return len(self._running)

    def set_replicas(self, replicas: Mapping[str, int]) -> None:
        """Set how many replicas are ready. A model with none counts as one: a request will start it."""
        for model in self._speeds:
            self._account(model)
            self._replicas[model] = max(1, replicas.get(model, 1))

    def open_models(self, priority: Priority) -> Collection[str] | None:
        """Returns the models of which another job may be leased; None means all, including unknown ones."""
        if sum(job.priority == priority for job in self._running.values()) >= self._max_running:
            return ()
        models = [model for model in self._speeds if self._has_room(model, priority)]
        return None if len(models) == len(self._speeds) else models

    def close(self, model: str, *, for_s: float) -> None:
        """Lease no more jobs of a model for `for_s` seconds."""
        if model in self._closed_until:
            self._closed_until[model] = max(self._closed_until[model], self._clock.monotonic() + for_s)

    def opens_in_s(self) -> float | None:
        """Returns the seconds until the next closed model opens; None when no model is closed."""
        now = self._clock.monotonic()
        return min((until - now for until in self._closed_until.values() if until > now), default=None)

    def begin(self, key: Hashable, *, model: str, priority: Priority, work: float) -> None:
        """Count a job that was leased."""
        self._running[key] = _RunningJob(model, priority, work)

    def advance(self, key: Hashable, *, done: float) -> None:
        """Note that an engine works on the job and has done this share of it, 0..1."""
        job = self._running[key]
        job.done = done
        if done < 1.0 and not job.is_working:
            self._account(job.model)
            job.is_working = True
        elif done >= 1.0:
            self._learn(job)

    def end(self, key: Hashable) -> None:
        """Count the job no longer; what it has done is what `advance` said last."""
        self._learn(self._running[key])
        del self._running[key]

    def predict_s(self, model: str, work: float) -> float | None:
        """Returns the seconds that a replica takes for this work; None while too little is known."""
        speed = self._speeds.get(model)
        return None if speed is None else speed.predict_s(work)

    def predict_end_s(self, key: Hashable) -> float | None:
        """Returns the seconds until a running job is done; one that waits comes after the jobs that go before it."""
        job = self._running[key]
        if job.is_working or job.done >= 1.0:
            return self.predict_s(job.model, job.work_left)
        ahead = [other for other in self._of(job.model) if job.priority in (other.priority, "batch")]
        return self._predict_all_s(job.model, ahead)

    def _has_room(self, model: str, priority: Priority) -> bool:
        if self._closed_until[model] > self._clock.monotonic():
            return False
        jobs = [job for job in self._of(model) if job.priority == priority]
        backlog_s = self._predict_all_s(model, jobs)
        if backlog_s is None:
            return len(jobs) < _JOBS_BEFORE_LEARNT * self._replicas[model]
        return not jobs or backlog_s < min(self._ahead_s[priority], self._most_ahead_s.get(model, inf))

    def _predict_all_s(self, model: str, jobs: Collection[_RunningJob]) -> float | None:
        """Returns the predicted seconds until these jobs are done; None while too little is known."""
        left_s = self.predict_s(model, sum(job.work_left for job in jobs))
        return None if left_s is None else left_s / self._replicas[model]

    def _of(self, model: str) -> list[_RunningJob]:
        return [job for job in self._running.values() if job.model == model]

    def _learn(self, job: _RunningJob) -> None:
        """Learn from a job that no engine works on any longer."""
        if not job.is_working:
            return
        self._account(job.model)
        job.is_working = False
        speed = self._speeds.get(job.model)
        if speed is not None and job.done > 0:
            speed.add(job.work * job.done)

    def _account(self, model: str) -> None:
        """Add the time since the last change, once for each replica that a job kept busy."""
        speed = self._speeds.get(model)
        if speed is None:
            return
        now = self._clock.monotonic()
        num_working = sum(job.is_working for job in self._of(model))
        speed.unaccounted_s += (now - speed.since) * min(num_working, self._replicas[model])
        speed.since = now
