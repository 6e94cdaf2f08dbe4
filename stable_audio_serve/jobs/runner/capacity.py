"""How many jobs a runner takes at a time: of each model as much predicted work as its engines get done in a while.

Work is counted in seconds of audio x steps x variations. What a unit of it costs is learnt from the jobs that end, as
throughput: the time a replica was busy for the work it did, so that batching shows. Pure bookkeeping.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass

from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.generation import GenerationRequest, Priority

_MEMORY = 0.9  # weight of what was known before, for each job that ends
_APART = 0.1  # jobs that end by this share of their time after one another do not end together
_JOBS_BEFORE_LEARNT = 4  # per replica
_LEAST_BUSY_S = 1e-6


def work_of(request: GenerationRequest, card: ModelCard) -> float:
    """Seconds of audio x steps x variations."""
    return request.duration_s * (request.steps or card.default_steps) * request.batch_size


@dataclass(slots=True)
class _Taken:
    model: str
    priority: Priority
    work: float
    done: float = 0.0  # the share of the work, 0..1
    is_working: bool = False  # an engine has begun with it and not ended

    @property
    def work_left(self) -> float:
        return self.work * (1.0 - self.done)


@dataclass(slots=True)
class _Speed:
    """Decaying sums of replica time spent and work done with it."""

    busy_s: float = 0.0
    work: float = 0.0
    unaccounted_s: float = 0.0  # spent since a job last ended
    since: float = 0.0

    def add(self, work: float) -> None:
        """A job ended that did this work. Of several that end together only the first makes older ones fade."""
        expected_s = self.predict_s(work)
        keep = _MEMORY ** min(1.0, self.unaccounted_s / (_APART * expected_s)) if expected_s else 1.0
        self.busy_s = self.busy_s * keep + max(self.unaccounted_s, _LEAST_BUSY_S)
        self.work = self.work * keep + work
        self.unaccounted_s = 0.0

    def predict_s(self, work: float) -> float | None:
        """How long a replica takes for this work, seconds; None while nothing is known."""
        return self.busy_s / self.work * work if self.work else None


class Capacity:
    """What one runner has taken and whether it should take more; `key` is any name of a job.

    Each priority has room of its own, so that neither keeps the other from the engines, which know what goes first.
    """

    def __init__(
        self,
        models: Collection[str],
        *,
        ahead_s: Mapping[Priority, float],
        max_running: int,
        clock: Clock = SystemClock(),
    ) -> None:
        """Of each priority `ahead_s` of predicted work may be with each replica of a model, and `max_running` jobs."""
        self._ahead_s = ahead_s
        self._max_running = max_running
        self._clock = clock
        self._taken: dict[Hashable, _Taken] = {}
        self._speeds = {model: _Speed() for model in models}
        self._replicas = dict.fromkeys(models, 1)
        self._closed_until = dict.fromkeys(models, float("-inf"))

    @property
    def num_taken(self) -> int:
        """Jobs in progress, of all models and priorities."""
        return len(self._taken)

    def set_replicas(self, replicas: Mapping[str, int]) -> None:
        """How many replicas are ready; a model without any is taken to get one when it is asked."""
        for model in self._speeds:
            self._account(model)
            self._replicas[model] = max(1, replicas.get(model, 1))

    def open_models(self, priority: Priority) -> Collection[str] | None:
        """The models of which another such job may be taken; None for all, also those that are not known here."""
        if sum(taken.priority == priority for taken in self._taken.values()) >= self._max_running:
            return ()
        models = [model for model in self._speeds if self._has_room(model, priority)]
        return None if len(models) == len(self._speeds) else models

    def close(self, model: str, *, for_s: float) -> None:
        """Take no more of a model for a time."""
        if model in self._closed_until:
            self._closed_until[model] = max(self._closed_until[model], self._clock.monotonic() + for_s)

    def opens_in_s(self) -> float | None:
        """Until the next closed model may be taken again; None when none is closed."""
        now = self._clock.monotonic()
        return min((until - now for until in self._closed_until.values() if until > now), default=None)

    def begin(self, key: Hashable, *, model: str, priority: Priority, work: float) -> None:
        """A job was taken."""
        self._taken[key] = _Taken(model, priority, work)

    def advance(self, key: Hashable, *, done: float) -> None:
        """An engine works on the job and has done this share of it, 0..1."""
        taken = self._taken[key]
        taken.done = done
        if done < 1.0 and not taken.is_working:
            self._account(taken.model)
            taken.is_working = True
        elif done >= 1.0:
            self._learn(taken)

    def end(self, key: Hashable) -> None:
        """The job is no longer in progress, having got as far as was last said."""
        self._learn(self._taken[key])
        del self._taken[key]

    def predict_s(self, model: str, work: float) -> float | None:
        """How long a replica takes for this work, seconds; None while too little is known."""
        speed = self._speeds.get(model)
        return None if speed is None else speed.predict_s(work)

    def predict_end_s(self, key: Hashable) -> float | None:
        """Time until a job that was taken is done, seconds: if it waits, after all of its model that it cannot pass."""
        taken = self._taken[key]
        if taken.is_working or taken.done >= 1.0:
            return self.predict_s(taken.model, taken.work_left)
        ahead = [other for other in self._of(taken.model) if taken.priority in (other.priority, "batch")]
        return self._predict_all_s(taken.model, ahead)

    def _has_room(self, model: str, priority: Priority) -> bool:
        if self._closed_until[model] > self._clock.monotonic():
            return False
        taken = [taken for taken in self._of(model) if taken.priority == priority]
        backlog_s = self._predict_all_s(model, taken)
        if backlog_s is None:
            return len(taken) < _JOBS_BEFORE_LEARNT * self._replicas[model]
        return not taken or backlog_s < self._ahead_s[priority]

    def _predict_all_s(self, model: str, taken: Collection[_Taken]) -> float | None:
        """Predicted time until these jobs are done, seconds; None while too little is known."""
        left_s = self.predict_s(model, sum(one.work_left for one in taken))
        return None if left_s is None else left_s / self._replicas[model]

    def _of(self, model: str) -> list[_Taken]:
        return [taken for taken in self._taken.values() if taken.model == model]

    def _learn(self, taken: _Taken) -> None:
        """From a job that an engine does not work on any more."""
        if not taken.is_working:
            return
        self._account(taken.model)
        taken.is_working = False
        speed = self._speeds.get(taken.model)
        if speed is not None and taken.done > 0:
            speed.add(taken.work * taken.done)

    def _account(self, model: str) -> None:
        """Count the time since the last change: of as many replicas as there were jobs to keep them busy."""
        speed = self._speeds.get(model)
        if speed is None:
            return
        now = self._clock.monotonic()
        num_working = sum(taken.is_working for taken in self._of(model))
        speed.unaccounted_s += (now - speed.since) * min(num_working, self._replicas[model])
        speed.since = now
