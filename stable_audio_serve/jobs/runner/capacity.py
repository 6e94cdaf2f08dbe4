"""Decide whether a runner may lease another job: the engines need capacity, and the artifact store must accept files.

The capacity of engines is measured in predicted seconds of work per replica. These seconds are computed from the
prices (time per unit of work) that the engines publish.

If the artifact store refuses a job's file, running more jobs would be useless. So the runner starts no job until a test
file of the same size can be written. Then it starts a single job, and more jobs when the file of that job is stored.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
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

# How much predicted work a runner may have in the engines of a model at a time, in seconds per replica. One job per
# replica is always allowed, so that no replica is idle while jobs wait. If the jobs of one client fill the limit, the
# other clients have it once more, so that a long job delays only its own client: engines do short work first. The limit
# is lower for batch jobs, which interactive requests overtake in the engine.
_AHEAD_S: Mapping[Priority, float] = {"interactive": 30.0, "batch": 5.0}
# A second limit: this share of the model's `target_wait_s`. The lower of the two limits applies. When work exceeds
# `target_wait_s`, autoscaling adds replicas, but a new replica cannot take over jobs that are already in an engine.
_AHEAD_SHARE = 0.5
_JOBS_WITHOUT_PRICES = 4  # limit of jobs per replica while the model's prices are unknown
_GRACE_S = 60.0  # a recorded refusal expires this long after the next probe should begin, because a probe may be slow


@dataclass(slots=True)
class _RunningJob:
    model: str
    client: str
    priority: Priority
    size: WorkSize
    at_once: WorkSize  # how much of the work is in an engine at a time
    done: float = 0.0  # how much of the job is done, 0..1
    is_working: bool = False  # whether an engine has begun to work on the job


class Capacity:
    """Tracks the running jobs of one runner, and decides whether the engines have capacity for more.

    Each priority has its own limit, so that the engines always have jobs of both priorities to choose from. In the
    methods, `key` identifies a job.
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
        """At most `max_running` jobs of each priority run at a time.

        `prices` returns the last prices of a model, or None if no replica has published prices yet. `target_wait_s` has
        the setting `replicas.target_wait_s` of each model.
        """
        self._prices = prices
        self._target_wait_s = target_wait_s
        self._max_running = max_running
        self._clock = clock
        self._running: dict[Hashable, _RunningJob] = {}
        self._replicas = dict.fromkeys(models, 1)
        self._closed_until = dict.fromkeys(models, float("-inf"))
        self._refused_until: dict[tuple[str, str], float] = {}  # for models and clients

    @property
    def num_running(self) -> int:
        """The number of running jobs of all models and priorities."""
        return len(self._running)

    def set_replicas(self, replicas: Mapping[str, int]) -> None:
        """Set the number of ready replicas of each model. 0 counts as 1, because a request starts a replica."""
        for model in self._replicas:
            self._replicas[model] = max(1, replicas.get(model, 1))

    def open_models(self, priority: Priority) -> Collection[str] | None:
        """Return the models whose jobs may be leased now. None = any model, even one that this server lacks."""
        if sum(job.priority == priority for job in self._running.values()) >= self._max_running:
            return ()
        models = [model for model in self._replicas if self._full_for(model, priority) is not None]
        return None if len(models) == len(self._replicas) else models

    def left_out(self, priority: Priority) -> Collection[tuple[str, str]]:
        """Return the open models and clients whose jobs may not be leased now."""
        now = self._clock.monotonic()
        self._refused_until = {pair: until for pair, until in self._refused_until.items() if until > now}
        full = [(model, client) for model in self._replicas for client in self._full_for(model, priority) or ()]
        return {*self._refused_until, *full}

    def close(self, model: str, *, for_s: float) -> None:
        """Allow no more jobs of a model for `for_s` seconds."""
        if model in self._closed_until:
            self._closed_until[model] = max(self._closed_until[model], self._clock.monotonic() + for_s)

    def refuse(self, model: str, client: str, *, for_s: float) -> None:
        """Allow no more jobs of a model for one client for `for_s` seconds, because the model's queue refused one.

        Jobs of other clients may start: a queue that refuses a client with much work accepts clients with little.
        """
        until = max(self._refused_until.get((model, client), -inf), self._clock.monotonic() + for_s)
        self._refused_until[model, client] = until

    def note_room(self, model: str) -> None:
        """Allow jobs of the refused clients of a model, because work that was in its queue will not be done."""
        self._refused_until = {pair: until for pair, until in self._refused_until.items() if pair[0] != model}

    def begin(
        self,
        key: Hashable,
        *,
        model: str,
        client: str,
        priority: Priority,
        size: WorkSize,
        at_once: WorkSize | None = None,
    ) -> None:
        """Count a job as running. Call this method when the job was leased.

        `size` is the work of the whole job. `at_once` is the most work that is in an engine at a time: for a long
        piece, the work of the largest section. None = `size`.
        """
        self._running[key] = _RunningJob(model, client, priority, size, at_once or size)

    def advance(self, key: Hashable, *, done: float) -> None:
        """Record how much of a job an engine has done, 0..1."""
        job = self._running[key]
        job.done, job.is_working = done, True

    def end(self, key: Hashable) -> None:
        """Stop counting a job as running."""
        del self._running[key]

    def predict_end_s(self, key: Hashable) -> float | None:
        """Return the predicted seconds until a running job is done, or None if the model's prices are unknown.

        If the job waits in an engine, the time includes the work of other jobs that may run before it.
        """
        job = self._running[key]
        own_s = self._predict_s(job.model, [job], num_replicas=1, is_whole=True)
        if job.is_working or own_s is None:
            return own_s
        ahead = [other for other in self._of(job.model) if job.priority in (other.priority, "batch")]
        num_replicas = self._replicas.get(job.model, 1)
        first_s = self._predict_s(job.model, ahead, num_replicas=num_replicas) or 0.0
        return first_s + own_s - (self._predict_s(job.model, [job], num_replicas=1) or 0.0)

    def _full_for(self, model: str, priority: Priority) -> Collection[str] | None:
        """Return the clients whose jobs of a model may not start now, or None if no client's job may start."""
        if self._closed_until[model] > self._clock.monotonic():
            return None
        jobs = [job for job in self._of(model) if job.priority == priority]
        num_replicas = self._replicas[model]
        backlog_s = self._predict_s(model, jobs, num_replicas=num_replicas)
        if backlog_s is None:
            return () if len(jobs) < _JOBS_WITHOUT_PRICES * num_replicas else None
        limit_s = min(_AHEAD_S[priority], _AHEAD_SHARE * self._target_wait_s.get(model, inf))
        if len(jobs) < num_replicas or backlog_s < limit_s:
            return ()
        own_s: dict[str, float] = dict.fromkeys((job.client for job in jobs), 0.0)
        for job in jobs:
            own_s[job.client] += self._predict_s(model, [job], num_replicas=num_replicas) or 0.0
        largest = max(own_s, key=own_s.__getitem__)
        return (largest,) if backlog_s - own_s[largest] < limit_s else None

    def _predict_s(
        self, model: str, jobs: Collection[_RunningJob], *, num_replicas: int, is_whole: bool = False
    ) -> float | None:
        """Return the predicted seconds that `num_replicas` replicas need for `jobs`.

        Counts the work that is in the engines now, or all work of the jobs if `is_whole` is true. Returns None if the
        model's prices are unknown.
        """
        prices = self._prices(model)
        if prices is None:
            return None
        sizes = ((job.size if is_whole else job.at_once, job.done) for job in jobs)
        return sum(prices.of(size) * (1.0 - done) for size, done in sizes) / 1000.0 / num_replicas

    def _of(self, model: str) -> list[_RunningJob]:
        return [job for job in self._running.values() if job.model == model]


class StorageGate:
    """Decides whether a runner may start jobs. It starts none while the artifact store refuses files.

    Use the object on one event loop only.
    """

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
        """`on_open` is called when the runner may start more jobs than before.

        The first probe of the artifact store begins at most `first_probe_s` seconds after the refusal of a file. If the
        store refuses the probe too, the pause before the next probe is twice as long, up to `last_probe_s`.
        """
        self._artifacts = artifacts
        self._refusals = refusals
        self._owner = owner
        self._metrics = metrics
        self._on_open = on_open
        self._first_probe_s = self._pause_s = first_probe_s
        self._last_probe_s = last_probe_s
        self._needed_bytes = 0
        self._last_was_stored = True  # False after a refusal, until a file is stored
        self._probing: asyncio.Task[None] | None = None
        self._recording: asyncio.Task[None] | None = None  # the last call that recorded a refusal in the database

    def admits(self, num_running: int) -> bool:
        """Return True if another job may start while `num_running` jobs are running."""
        return self._probing is None and (self._last_was_stored or num_running == 0)

    @property
    def others_first_s(self) -> float:
        """How long a job whose file was refused must wait, so that other jobs start before it. 0 = not at all.

        The first job that starts after a refusal runs alone. If it were the same job again, a file that never fits
        would keep all other jobs waiting until its job is a dead letter.
        """
        return 0.0 if self._probing is None else self._pause_s  # twice the pause before the next probe

    def note_refused(self, error: StorageError, *, num_bytes: int) -> None:
        """Record that a file could not be stored or read. `num_bytes` is the size of a file to probe with."""
        self._last_was_stored = False
        self._needed_bytes = max(self._needed_bytes, num_bytes)
        if self._probing is None:
            self._probing = asyncio.create_task(self._probe_until_accepted(error))

    def note_stored(self) -> None:
        """Record that a file was stored."""
        if self._probing is None and not self._last_was_stored:
            self._last_was_stored = True
            self._pause_s = self._first_probe_s
            self._on_open()

    async def close(self) -> None:
        """Stop probing. Deletes the database's record of the refusal, which health checks read."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)
            if self._recording is not None:
                await asyncio.gather(self._recording, return_exceptions=True)
            await self._withdraw()

    async def _probe_until_accepted(self, error: StorageError) -> None:
        """Write test files, with pauses, until a file as large as the refused ones can be written."""
        log.error(
            "job starts are paused: the artifact store refuses files",
            reason=error.message,
            num_bytes=self._needed_bytes,
        )
        self._metrics.gauge("job_files_refused", 1.0)
        refused: StorageError | None = error
        while refused is not None:
            pause_s = self._pause_s * random.uniform(0.5, 1.0)
            self._pause_s = min(2 * self._pause_s, self._last_probe_s)
            with suppress(StorageError):  # the database may be full too; health checks find that themselves
                record = partial(self._refusals.record, self._owner, health_of(refused), for_s=pause_s + _GRACE_S)
                self._recording = asyncio.create_task(asyncio.to_thread(record))
                await asyncio.shield(self._recording)  # the thread cannot be cancelled; `close` waits for it
            await asyncio.sleep(pause_s)
            refused = await self._probe()
        log.warning("job starts are resumed: the artifact store accepts files")
        self._metrics.gauge("job_files_refused", 0.0)
        await self._withdraw()
        self._needed_bytes, self._probing = 0, None
        self._on_open()

    async def _probe(self) -> StorageError | None:
        try:
            await self._artifacts.probe(self._needed_bytes)
        except StorageError as error:
            return error
        except Exception:
            log.exception("the probe of the artifact store failed")
            return StorageError("the artifact store fails")
        return None

    async def _withdraw(self) -> None:
        with suppress(StorageError):  # then the record of the refusal expires later
            await asyncio.to_thread(self._refusals.withdraw, self._owner)
