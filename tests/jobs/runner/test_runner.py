"""How a job runner starts, stops and takes over jobs, and how often it polls the database when idle."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import pytest

from stable_audio_serve.core.errors import (
    GenerationError,
    StorageError,
)
from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs.runner.attempt import RunnerPauses
from tests.backends import ToneBackend
from tests.jobs.conftest import CountingBackend, Workshop, make_spec, upload
from tests.patience import until

pytestmark = pytest.mark.server


@pytest.mark.parametrize("job_settings", [JobSettings(max_running=2)])
async def test_running_jobs_never_exceed_the_limit(workshop: Workshop) -> None:
    workshop.backend = backend = CountingBackend(delay_s=0.1)
    backend.released.clear()
    jobs = [await workshop.queue.submit(make_spec()) for _ in range(5)]
    await workshop.start_runner()
    await until(lambda: backend.num_running == 2)
    backend.released.set()
    for job in jobs:
        await workshop.finished(job)
    assert backend.most_running == 2


@pytest.mark.parametrize("job_settings", [JobSettings(max_running=1)])
async def test_each_priority_has_its_own_queue_and_room(workshop: Workshop) -> None:
    """The runner may run one job of each priority at a time.

    So one job of each priority starts at once. The jobs of each priority run in order of arrival.
    """
    jobs = [
        await workshop.queue.submit(make_spec(priority=priority))
        for priority in ("batch", "interactive", "batch", "interactive")
    ]
    assert [await workshop.queue.position(job) for job in jobs] == [0, 0, 1, 1]
    await workshop.start_runner()
    for job in jobs:
        await workshop.finished(job)
    started = [(request.request_id, request.priority) for _, request in workshop.backend.requests]
    assert {job_id for job_id, _ in started[:2]} == {jobs[0].spec.id, jobs[1].spec.id}
    for priority, indices in (("batch", (0, 2)), ("interactive", (1, 3))):
        assert [job_id for job_id, of in started if of == priority] == [jobs[index].spec.id for index in indices]


async def test_submission_wakes_a_pausing_runner(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    polls = count_polls(workshop, monkeypatch)
    await workshop.start_runner(pauses=RunnerPauses(first_poll_s=600.0, last_poll_s=600.0))
    await until(lambda: len(polls) == 1)
    await asyncio.sleep(0.05)
    assert (await workshop.finished(await workshop.queue.submit(make_spec()))).state == "succeeded"


async def test_lost_wake_up_costs_one_polling_interval(workshop: Workshop) -> None:
    await workshop.start_runner()
    workshop.queue.wake = lambda: None
    assert (await workshop.finished(await workshop.queue.submit(make_spec()))).state == "succeeded"


def count_polls(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list to which the time, in seconds, of each poll of the job store is added."""
    polls: list[float] = []
    outlook = workshop.queue.store.runners.outlook

    def count(owner: str) -> Any:
        polls.append(time.monotonic())
        return outlook(owner)

    monkeypatch.setattr(workshop.queue.store.runners, "outlook", count)
    return polls


async def test_idle_runner_rarely_polls_its_store(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    polls = count_polls(workshop, monkeypatch)
    await workshop.start_runner(pauses=RunnerPauses(first_poll_s=0.02, last_poll_s=0.1))
    await until(lambda: len(polls) > 5)
    pauses_s = [later - earlier for earlier, later in itertools.pairwise(polls)]
    assert all(pause_s >= least_s for pause_s, least_s in zip(pauses_s, (0.04, 0.08, 0.1, 0.1, 0.1), strict=False))
    assert RunnerPauses().first_poll_s >= 0.1
    assert RunnerPauses().last_poll_s >= 3.0


async def test_waiting_job_is_cancelled_before_it_starts(workshop: Workshop) -> None:
    job = await workshop.queue.submit(make_spec(upload=await upload(workshop)))
    assert (await workshop.queue.cancel(job.spec.ref._replace(client="other")))[0] == "unknown"
    assert (await workshop.queue.cancel(job.spec.ref))[0] == "removed"
    assert (await workshop.queue.cancel(job.spec.ref))[0] == "already_over"
    await until(lambda: workshop.files() == [])
    await workshop.start_runner()
    await asyncio.sleep(0.1)
    assert workshop.backend.requests == []


@pytest.mark.parametrize("job_settings", [JobSettings(lease_s=600.0)])
async def test_running_job_is_stopped_at_once(workshop: Workshop) -> None:
    """The cancellation wakes the runner, whose next heartbeat or poll would be minutes later."""
    workshop.backend.released.clear()
    await workshop.start_runner(pauses=RunnerPauses(first_poll_s=600.0, last_poll_s=600.0))
    job = await workshop.queue.submit(make_spec(upload=await upload(workshop)))
    await workshop.until(job, lambda job: workshop.backend.num_running > 0)
    assert (await workshop.queue.cancel(job.spec.ref))[0] == "requested"
    job = await workshop.finished(job)
    assert job.error is not None
    assert (job.state, job.error.code) == ("cancelled", "cancelled")
    assert workshop.backend.num_cancelled == 1
    await until(lambda: workshop.files() == [])


async def test_cancelling_one_job_leaves_the_others_running(workshop: Workshop) -> None:
    workshop.backend.released.clear()
    await workshop.start_runner()
    jobs = [await workshop.queue.submit(make_spec()) for _ in range(3)]
    await until(lambda: workshop.backend.num_running == 3)
    await workshop.queue.cancel(jobs[1].spec.ref)
    assert (await workshop.finished(jobs[1])).state == "cancelled"
    workshop.backend.released.set()
    assert [(await workshop.finished(job)).state for job in jobs] == ["succeeded", "cancelled", "succeeded"]


@pytest.mark.parametrize("job_settings", [JobSettings(max_running=1)])
async def test_job_that_cannot_start_in_time_fails(workshop: Workshop) -> None:
    workshop.backend.released.clear()
    await workshop.start_runner()
    first = await workshop.queue.submit(make_spec())
    await until(lambda: workshop.backend.num_running == 1)
    late = await workshop.queue.submit(make_spec(start_within_s=0.1, upload=await upload(workshop)))
    late = await workshop.finished(late)
    workshop.backend.released.set()
    assert late.error is not None
    assert (late.state, late.error.code, late.attempts) == ("failed", "start_timeout", 0)
    assert (await workshop.finished(first)).state == "succeeded"
    await until(lambda: workshop.files() == [f"{first.spec.id}-audio.wav"])


async def test_next_runner_takes_over_expired_leases(workshop: Workshop) -> None:
    job = await workshop.queue.submit(make_spec(upload=await upload(workshop)))
    assert workshop.queue.store.runners.lease("a dead one", lease_s=0.5) is not None
    await workshop.start_runner()
    job = await workshop.finished(job)
    assert (job.state, job.attempts) == ("succeeded", 2)
    await until(lambda: workshop.files() == [f"{job.spec.id}-2-audio.wav"])


async def test_stopping_runner_requeues_jobs_without_an_attempt(workshop: Workshop) -> None:
    workshop.backend.delay_s = 60
    first = await workshop.start_runner()
    job = await workshop.queue.submit(make_spec(upload=await upload(workshop)))
    await workshop.until(job, lambda _: workshop.backend.num_running > 0)
    await first.close()
    job = await workshop.until(job, lambda job: job.state == "queued")
    assert (job.attempts, job.started_at) == (0, None)
    workshop.backend.delay_s = 0
    await workshop.start_runner()
    job = await workshop.finished(job)
    assert (job.state, job.attempts) == ("succeeded", 1)


async def test_loop_survives_a_store_outage(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = await workshop.start_runner()
    store, outlook = workshop.queue.store, workshop.queue.store.runners.outlook

    num_failures = 0

    def fail(_: str) -> Any:
        nonlocal num_failures
        num_failures += 1
        raise StorageError("the disk is full")

    monkeypatch.setattr(store.runners, "outlook", fail)
    job = await workshop.queue.submit(make_spec())
    await until(lambda: num_failures >= 3)
    runner.check_health()
    monkeypatch.setattr(store.runners, "outlook", outlook)
    assert (await workshop.finished(job)).state == "succeeded"


async def test_runner_starts_during_a_store_outage(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    store = workshop.queue.store
    job = await workshop.queue.submit(make_spec())
    store.runners.lease("a runner that died", lease_s=0.0)

    num_failures = 0

    def fail(*_: Any, **__: Any) -> Any:
        nonlocal num_failures
        num_failures += 1
        raise StorageError("no answer")

    with monkeypatch.context() as away:
        for name in ("outlook", "reclaim", "renew", "lease"):
            away.setattr(store.runners, name, fail)
        runner = await workshop.start_runner()
        await until(lambda: num_failures >= 5)
        runner.check_health()
    assert (await workshop.finished(job)).state == "succeeded"


async def test_draining_runner_requeues_its_jobs_and_stays_healthy(workshop: Workshop) -> None:
    workshop.backend = backend = ToneBackend(delay_s=30)
    jobs = [await workshop.queue.submit(make_spec()) for _ in range(2)]
    runner = await workshop.start_runner()
    await until(lambda: backend.num_running == 2)
    await until(lambda: not runner.drain())
    for job in jobs:
        now = workshop.queue.store.clients.get(job.spec.ref)
        assert now is not None
        assert (now.state, now.attempts) == ("queued", 0)
    runner.wake()
    await asyncio.sleep(0.1)
    assert backend.num_running == 0  # the runner has started no other job
    runner.check_health()


async def test_draining_runner_finishes_jobs_that_requests_wait_for(workshop: Workshop) -> None:
    workshop.backend.released.clear()
    awaited, other = [await workshop.queue.submit(make_spec(is_awaited=awaited)) for awaited in (True, False)]
    runner = await workshop.start_runner()
    await until(lambda: workshop.backend.num_running == 2)
    await until(lambda: runner.drain() == 1)
    await workshop.until(other, lambda job: job.state == "queued")
    workshop.backend.released.set()
    assert (await workshop.finished(awaited)).state == "succeeded"
    await until(lambda: runner.drain() == 0)


async def test_closing_runner_requeues_jobs_that_requests_wait_for(workshop: Workshop) -> None:
    workshop.backend.released.clear()
    job = await workshop.queue.submit(make_spec(is_awaited=True))
    runner = await workshop.start_runner()
    await until(lambda: workshop.backend.num_running == 1)
    runner.drain()
    await runner.close()
    now = await workshop.queue.get(job.spec.ref)
    assert now is not None
    assert (now.state, now.attempts) == ("queued", 0)


@pytest.mark.parametrize("job_settings", [JobSettings(max_running=1)])
async def test_holding_runner_finishes_its_jobs_and_leases_no_others(workshop: Workshop) -> None:
    workshop.backend.released.clear()
    first, second, third = [await workshop.queue.submit(make_spec()) for _ in range(3)]
    runner = await workshop.start_runner()
    await workshop.until(first, lambda job: job.state == "running")
    runner.hold()
    assert (runner.is_holding, runner.num_held) == (True, 1)
    workshop.backend.released.set()
    assert (await workshop.finished(first)).state == "succeeded"
    await until(lambda: runner.num_held == 0)
    await asyncio.sleep(0.5)  # in this time the runner polls several times
    runner.check_health()
    queued = [await workshop.queue.get(job.spec.ref) for job in (second, third)]
    assert [(job.state, job.attempts) for job in queued if job] == [("queued", 0)] * 2
    other = await workshop.start_runner()
    assert (await workshop.finished(second)).state == "succeeded"
    other.hold()
    await until(lambda: other.num_held == 0)
    runner.resume()
    assert (await workshop.finished(third)).state == "succeeded"
    last = await workshop.queue.submit(make_spec())
    runner.wake()
    assert (await workshop.finished(last)).state == "succeeded"


async def test_health_check_reports_an_ended_loop(workshop: Workshop) -> None:
    runner = await workshop.start_runner()
    runner.check_health()
    await runner.close()
    with pytest.raises(GenerationError):
        runner.check_health()
