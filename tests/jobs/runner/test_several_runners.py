"""Several job runners share one job store. A runner takes over the jobs of another one that is silent, dead or late."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import sqlalchemy as sa

from stable_audio_serve.core.errors import ModelUnavailableError, OverloadedError, StorageError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, ProgressCallback
from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs.job import Job, JobResult
from stable_audio_serve.jobs.runner import runner as runner_module
from stable_audio_serve.jobs.runner.attempt import RunnerPauses
from stable_audio_serve.jobs.runner.runner import JobRunner
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.runner_jobs import RunnerJobs
from stable_audio_serve.jobs.store.tables import JOBS
from tests.backends import ToneBackend
from tests.jobs.conftest import SHORT_PAUSES, Workshop, make_spec
from tests.jobs.stores import Wall, wall
from tests.patience import PATIENCE_S, until, wait_until
from tests.recorded_metrics import RecordedMetrics

pytestmark = pytest.mark.server

__all__ = ["wall"]

_LEASE_S = 0.3  # leases expire by a clock that only tests advance; runners renew them every 0.1 s of real time


@pytest.fixture
def now(wall: Wall) -> Wall:
    return wall


@pytest.fixture
def job_settings() -> JobSettings:
    return make_job_settings()


def make_job_settings(**limits: Any) -> JobSettings:
    """Return job settings with very short leases. The settings would refuse such a value of `lease_s`."""
    return JobSettings(**limits).model_copy(update={"lease_s": _LEASE_S})


def end_leases(workshop: Workshop) -> None:
    """Make all leases expire now."""
    with workshop.queue.store.database.writing() as connection:
        connection.execute(sa.update(JOBS).where(JOBS.c.state == "running").values(lease_until=0.0))


def count_calls(monkeypatch: pytest.MonkeyPatch, jobs: RunnerJobs, name: str) -> list[str]:
    """Return a list that grows by one item with each completed call of the store's method `name`."""
    calls: list[str] = []
    method = getattr(jobs, name)

    def call(*args: Any, **options: Any) -> Any:
        try:
            return method(*args, **options)
        finally:
            calls.append(name)

    monkeypatch.setattr(jobs, name, call)
    return calls


def outlive_leases(wall: Wall, renewals: list[str]) -> None:
    """Advance the clock by more than three times `_LEASE_S`, while the runner renews its lease in time.

    Before each step of the clock, waits for two renewals. Blocks the event loop.
    """
    for _ in range(4):
        enough = len(renewals) + 2  # one renewal may have begun before the clock advanced, so wait for two
        wait_until(lambda: len(renewals) >= enough, every_s=0.01)  # noqa: B023
        wall.now += 0.8 * _LEASE_S


async def running(workshop: Workshop, num_running: int = 1) -> None:
    await until(lambda: workshop.backend.num_running == num_running)


async def test_runners_share_the_jobs_and_run_each_once(workshop: Workshop) -> None:
    workshop.backend.delay_s = 0.05
    for _ in range(3):
        await workshop.start_runner()
    jobs = [await workshop.queue.submit(make_spec()) for _ in range(12)]
    ended = [await workshop.finished(job) for job in jobs]
    assert {(job.state, job.attempts) for job in ended} == {("succeeded", 1)}
    assert len(workshop.backend.requests) == 12


async def test_job_longer_than_its_lease_stays_with_its_runner(
    workshop: Workshop, wall: Wall, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop.backend.released.clear()
    renewals = count_calls(monkeypatch, workshop.queue.store.runners, "renew")
    for _ in range(2):
        await workshop.start_runner()
    job = await workshop.queue.submit(make_spec())
    await running(workshop)
    await asyncio.to_thread(outlive_leases, wall, renewals)
    workshop.backend.released.set()
    job = await workshop.finished(job)
    assert (job.state, job.attempts) == ("succeeded", 1)
    assert len(workshop.backend.requests) == 1


async def test_job_of_a_dead_runner_survives_a_clock_set_back(workshop: Workshop, wall: Wall) -> None:
    job = await workshop.queue.submit(make_spec())
    assert workshop.queue.store.runners.lease("dead", lease_s=_LEASE_S) is not None
    wall.now -= 3600.0
    await workshop.start_runner()
    await until(lambda: not workshop.queue.store.runners.outlook("").is_set_back)
    wall.now += 1.1 * _LEASE_S
    job = await workshop.finished(job)
    assert (job.state, job.attempts) == ("succeeded", 2)


async def test_running_job_survives_a_clock_set_back(workshop: Workshop, wall: Wall) -> None:
    workshop.backend.released.clear()
    for _ in range(2):
        await workshop.start_runner()
    job = await workshop.queue.submit(make_spec())
    await running(workshop)
    wall.now -= 3600.0
    await until(lambda: not workshop.queue.store.runners.outlook("").is_set_back)
    workshop.backend.released.set()
    job = await workshop.finished(job)
    assert (job.state, job.attempts) == ("succeeded", 1)
    assert len(workshop.backend.requests) == 1


async def test_busy_event_loop_loses_no_lease(workshop: Workshop, wall: Wall, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.backend.released.clear()
    renewals = count_calls(monkeypatch, workshop.queue.store.runners, "renew")
    await workshop.start_runner()
    job = await workshop.queue.submit(make_spec())
    await running(workshop)
    outlive_leases(wall, renewals)  # this call blocks the event loop
    workshop.backend.released.set()
    assert workshop.queue.store.runners.reclaim(max_attempts=3) == []
    assert (await workshop.finished(job)).attempts == 1


# The runner may run only one job at a time, so it cannot lease the job again before "another" does.
@pytest.mark.parametrize("job_settings", [make_job_settings(max_running=1)])
async def test_runner_without_its_lease_stops_and_writes_nothing(workshop: Workshop) -> None:
    workshop.backend.delay_s = 60
    metrics = RecordedMetrics()
    await workshop.start_runner(metrics=metrics)
    job = await workshop.queue.submit(make_spec())
    await running(workshop)

    def reclaim() -> list[Job]:
        end_leases(workshop)
        return workshop.queue.store.runners.reclaim(max_attempts=3)

    (taken,) = await until(reclaim)  # again if the runner has renewed its lease between the two calls
    other = workshop.queue.store.runners.lease("another", lease_s=60.0)
    assert other is not None
    await until(lambda: workshop.backend.num_cancelled == 1)
    await until(lambda: metrics.counters["job_leases_lost"] == 1)
    now = await workshop.queue.get(job.spec.ref)
    assert now is not None
    assert (now.state, now.attempts, now.lease) == ("running", 2, other.lease)
    assert (taken.state, workshop.files()) == ("queued", [])


# The late runner may run only one job at a time, so it cannot lease the same job again after its lease has expired.
@pytest.mark.parametrize("job_settings", [make_job_settings(max_running=1)])
async def test_late_runner_deletes_its_own_file_only(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner stores its file, but commits the result only after another runner has done the job."""
    store = JobStore(workshop.queue.store.database, workshop.settings.jobs)
    succeed, asleep, woken = store.runners.succeed, threading.Event(), threading.Event()

    def late(job: Job, result: JobResult) -> Job | None:
        asleep.set()
        assert woken.wait(PATIENCE_S)
        return succeed(job, result)

    monkeypatch.setattr(store.runners, "succeed", late)
    monkeypatch.setattr(store.runners, "renew", lambda *_, **__: woken.wait(PATIENCE_S) and [])
    metrics = RecordedMetrics()
    runner = JobRunner(
        store,
        workshop.queue.artifacts,
        backend=workshop.backend,
        settings=workshop.settings,
        pauses=SHORT_PAUSES,
        metrics=metrics,
    )
    workshop.runners.append(runner)
    await runner.start()
    job = await workshop.queue.submit(make_spec())
    await until(asleep.is_set)
    end_leases(workshop)
    await workshop.start_runner()
    ended = await workshop.finished(job)
    assert (ended.state, ended.attempts) == ("succeeded", 2)
    assert workshop.files() == [f"{job.spec.id}-2-audio.wav", f"{job.spec.id}-audio.wav"]
    woken.set()
    await until(lambda: workshop.files() == [f"{job.spec.id}-2-audio.wav"])
    assert await workshop.queue.get(job.spec.ref) == ended
    assert ended.result is not None
    assert [chunk async for chunk in workshop.queue.artifacts.read(ended.result.file)]
    await until(lambda: metrics.counters["job_leases_lost"] == 1)


async def test_success_with_a_lost_answer_counts(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    store, succeed = workshop.queue.store, workshop.queue.store.runners.succeed
    num_calls = 0

    def cut(job: Job, result: JobResult) -> Job | None:
        nonlocal num_calls
        num_calls += 1
        ended = succeed(job, result)
        if num_calls == 1:
            raise StorageError("the connection was cut after the commit")
        return ended

    monkeypatch.setattr(store.runners, "succeed", cut)
    metrics = RecordedMetrics()
    await workshop.start_runner(metrics=metrics)
    job = await workshop.finished(await workshop.queue.submit(make_spec()))
    assert job.state == "succeeded"
    await until(lambda: bool(metrics.counters["jobs", "succeeded", "sa3"]))
    assert num_calls == 2
    assert workshop.files() == [f"{job.spec.id}-audio.wav"]


@pytest.mark.parametrize("job_settings", [make_job_settings(max_running=1)])
async def test_cancel_reaches_the_runner_of_the_job(workshop: Workshop) -> None:
    workshop.backend.delay_s = 60
    runners = [await workshop.start_runner() for _ in range(3)]

    def wake_all() -> None:
        for runner in runners:
            runner.wake()

    workshop.queue.wake = wake_all
    jobs = [await workshop.queue.submit(make_spec()) for _ in range(3)]
    await running(workshop, 3)
    for job in jobs:
        await workshop.queue.cancel(job.spec.ref)
    assert [(await workshop.finished(job)).state for job in jobs] == ["cancelled"] * 3


async def test_idle_runners_poll_less_than_once_a_second(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    polls = count_calls(monkeypatch, workshop.queue.store.runners, "outlook")
    for _ in range(3):
        await workshop.start_runner()
    await until(lambda: len(polls) > 6)
    statements: list[str] = []
    engine = workshop.queue.store.database.engine
    sa.event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    num_before = len(polls)
    await until(lambda: len(polls) >= num_before + 10)
    num_polls = len(polls) - num_before  # before the number of queries, because polls go on
    num_queries = sum(not statement.startswith(("BEGIN", "COMMIT", "PRAGMA")) for statement in [*statements])
    # Each of the three runners may have begun a poll without having sent its query yet.
    assert num_polls - 3 <= num_queries < RunnerPauses().last_poll_s * num_polls


class OneFullModel(ToneBackend):
    """A test backend of several models. The model `medium` refuses every request with OverloadedError."""

    async def generate(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
    ) -> GenerationResult:
        if model == "medium":
            self.requests.append((model, request))
            raise OverloadedError("the queue is full", retry_after_s=60.0)
        return await super().generate(model, request, on_progress=on_progress)


async def test_full_model_delays_no_other_model(workshop: Workshop) -> None:
    workshop.backend = OneFullModel()
    await workshop.start_runner()
    waiting = [await workshop.queue.submit(make_spec(model="medium")) for _ in range(20)]
    done = [await workshop.finished(await workshop.queue.submit(make_spec())) for _ in range(3)]
    assert [job.state for job in done] == ["succeeded"] * 3
    refused = [model for model, _ in workshop.backend.requests if model == "medium"]
    assert len(refused) <= 4
    states = [await workshop.queue.get(job.spec.ref) for job in waiting]
    assert {(job.state, job.attempts) for job in states if job} == {("queued", 0)}


@pytest.mark.parametrize("job_settings", [make_job_settings(max_attempts=2)])
async def test_metrics_count_the_outcomes_of_jobs(
    workshop: Workshop, wall: Wall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "_COUNT_S", 0.1)  # otherwise 15 s
    metrics = RecordedMetrics()
    spec = make_spec()
    await workshop.queue.submit(spec)
    assert workshop.queue.store.runners.lease("a dead one", lease_s=0.0) is not None
    first = await workshop.start_runner(metrics=metrics)
    await workshop.finished(await workshop.queue.submit(make_spec()))
    await first.close()
    dead = await workshop.queue.submit(make_spec())
    for _ in range(2):
        workshop.queue.store.runners.lease("a dead one", lease_s=0.0)
        if _ == 0:
            workshop.queue.store.runners.reclaim(max_attempts=2)
    await workshop.queue.submit(make_spec(model="medium"))
    wall.now += 0.3
    workshop.backend = OneFullModel()
    await workshop.start_runner(metrics=metrics)
    await workshop.finished(dead)
    await until(lambda: metrics.gauges.get(("jobs_by_state", "failed")) == 1)
    assert metrics.counters["jobs", "succeeded", "sa3"] == 2
    assert metrics.counters["jobs", "failed", "sa3"] == 1
    assert metrics.counters["job_dead_letters", "unavailable"] == 1
    assert metrics.gauges["jobs_by_state", "succeeded"] == 2
    assert metrics.gauges["jobs_by_state", "queued"] == 1


async def test_metrics_show_queue_age_and_retries(workshop: Workshop, wall: Wall) -> None:
    class OnceAway(ToneBackend):
        async def generate(
            self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
        ) -> GenerationResult:
            if not self.requests:
                self.requests.append((model, request))
                raise ModelUnavailableError("lost its replica")
            return await super().generate(model, request, on_progress=on_progress)

    class Oldest(RecordedMetrics):
        age_s = 0.0

        def gauge(self, name: str, value: float, **tags: str) -> None:
            self.age_s = max(self.age_s, value if name == "job_queue_age_s" else 0.0)

    workshop.backend, metrics = OnceAway(), Oldest()
    job = await workshop.queue.submit(make_spec())
    wall.now += 5.0
    await workshop.start_runner(metrics=metrics)
    await workshop.until(job, lambda job: job.state == "queued" and metrics.counters.total() > 0)
    wall.now += 1.0  # the pause before the second attempt is over
    assert (await workshop.finished(job)).attempts == 2
    assert metrics.counters["job_retries", "unavailable"] == 1
    assert metrics.age_s == pytest.approx(5.0)
    assert metrics.samples["job_wait_ms", job.spec.model] == [pytest.approx(6000.0)]


async def test_lease_with_a_lost_answer_is_not_renewed(
    workshop: Workshop, wall: Wall, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database's answer to `lease` is lost, so the runner does not know that it has the lease.

    The lease must expire. Otherwise the job would stay "running" until the runner stops, although nobody runs it.
    """
    workshop.backend.released.clear()
    renewals = count_calls(monkeypatch, workshop.queue.store.runners, "renew")
    await workshop.start_runner()
    long = await workshop.queue.submit(make_spec())
    await running(workshop)
    store, lease = workshop.queue.store, workshop.queue.store.runners.lease
    was_cut = False

    def cut(*args: Any, **options: Any) -> Job | None:
        nonlocal was_cut
        job = lease(*args, **options)
        if job is not None and not was_cut:
            was_cut = True
            raise StorageError("the connection was cut after the commit")
        return job

    monkeypatch.setattr(store.runners, "lease", cut)
    lost = await workshop.queue.submit(make_spec())
    await until(lambda: was_cut)
    await asyncio.to_thread(outlive_leases, wall, renewals)
    await workshop.until(lost, lambda job: job.attempts == 2)
    now = await workshop.queue.get(long.spec.ref)
    assert now is not None
    assert (now.state, now.attempts) == ("running", 1)


async def test_store_outage_longer_than_a_lease_costs_no_attempt(
    workshop: Workshop, wall: Wall, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runner does not take over its own jobs, even if it could not renew their leases in time."""
    workshop.backend.released.clear()
    store = workshop.queue.store.runners
    reclaims, renew = count_calls(monkeypatch, store, "reclaim"), store.renew

    def renew_unless_away(*args: Any, **options: Any) -> Any:
        if threading.current_thread().name == "job-heartbeat":
            raise StorageError("no answer")
        return renew(*args, **options)

    monkeypatch.setattr(store, "renew", renew_unless_away)
    runner = await workshop.start_runner()
    job = await workshop.queue.submit(make_spec())
    await running(workshop)
    before = len(reclaims)
    wall.now += 2 * _LEASE_S
    runner.wake()
    await until(lambda: len(reclaims) > before)
    workshop.backend.released.set()
    ended = await workshop.finished(job)
    assert (ended.state, ended.attempts, len(workshop.backend.requests)) == ("succeeded", 1, 1)


async def test_other_runners_keep_their_jobs_after_a_store_outage(
    workshop: Workshop, wall: Wall, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their leases have expired, but they have had no time to renew them."""
    workshop.settings = workshop.settings.model_copy(update={"jobs": JobSettings(lease_s=3600.0)})
    store = workshop.queue.store.runners
    turns = count_calls(monkeypatch, store, "outlook")
    runner = await workshop.start_runner()
    runner.hold()
    await until(lambda: turns)
    job = await workshop.queue.submit(make_spec())
    assert store.lease("other", lease_s=_LEASE_S) is not None
    with monkeypatch.context() as away:
        away.setattr(store, "outlook", Mock(side_effect=StorageError("no answer")))
        fails = count_calls(away, store, "outlook")
        await until(lambda: fails)
        wall.now += 2 * _LEASE_S
    enough = len(turns) + 3
    await until(lambda: len(turns) > enough)
    assert len(store.renew("other", lease_s=_LEASE_S, refs=[job.spec.ref])) == 1


async def test_stopping_runner_requeues_a_job_with_a_slow_upload(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, answered = threading.Event(), threading.Event()

    def silent() -> Iterator[bytes]:
        begun.set()
        answered.wait(PATIENCE_S)
        raise StorageError("no answer")
        yield b""

    artifacts, put = workshop.queue.artifacts, workshop.queue.artifacts.put
    monkeypatch.setattr(artifacts, "put", lambda key, _, **options: put(key, silent, **options))
    runner = await workshop.start_runner()
    job = await workshop.queue.submit(make_spec())
    await until(begun.is_set)
    await runner.close()
    answered.set()
    now = await workshop.queue.get(job.spec.ref)
    assert now is not None
    assert (now.state, now.attempts) == ("queued", 0)
