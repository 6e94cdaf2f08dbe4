"""How an attempt to run a job can end, and after which errors the job is tried again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from stable_audio_serve.core.errors import (
    DamagedFileError,
    DeadlineExceededError,
    GenerationError,
    InvalidRequestError,
    ModelRestartingError,
    ModelUnavailableError,
    OverloadedError,
    StableAudioError,
    StartTimeoutError,
    StorageError,
)
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, Progress, ProgressCallback
from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs.runner import attempt
from stable_audio_serve.jobs.store import turns
from stable_audio_serve.jobs.store.tables import JOBS
from tests.backends import ToneBackend
from tests.jobs.conftest import SHORT_PAUSES, Workshop, make_spec, upload
from tests.patience import PATIENCE_S, until

pytestmark = pytest.mark.server


class FailingBackend(ToneBackend):
    """A test backend whose first requests fail with `errors`, one after the other. Later requests succeed."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__()
        self.errors = list(errors)

    async def generate(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
    ) -> GenerationResult:
        if self.errors:
            self.requests.append((model, request))
            raise self.errors.pop(0)
        return await super().generate(model, request)


async def test_missing_upload_fails_its_job(workshop: Workshop) -> None:
    kept = await upload(workshop)
    await workshop.queue.artifacts.delete(kept.file.key)
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_spec(upload=kept)))
    assert job.error is not None
    assert (job.state, job.error.code) == ("failed", "storage")


async def test_start_timeout_includes_the_wait_in_the_engine(workshop: Workshop) -> None:
    workshop.backend = FailingBackend(StartTimeoutError("it did not start within its 5 s"))
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_spec(start_within_s=5.0)))
    assert job.error is not None
    assert (job.state, job.error.code) == ("failed", "start_timeout")


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError("steps: at most 9", field="steps"),
        GenerationError("not finite"),
        DeadlineExceededError("too late"),
    ],
)
async def test_failure_of_the_job_itself_is_not_retried(workshop: Workshop, error: StableAudioError) -> None:
    workshop.backend = FailingBackend(error)
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_spec(upload=await upload(workshop))))
    assert job.error is not None
    assert (job.state, job.attempts) == ("failed", 1)
    assert (job.error.code, job.error.message, job.error.field) == (error.kind, error.message, error.field)
    await until(lambda: workshop.files() == [])


async def test_unexpected_failure_hides_its_text(workshop: Workshop) -> None:
    workshop.backend = FailingBackend(RuntimeError("/secret/path"))
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_spec()))
    assert job.error is not None
    assert job.error.code == "generation_failed"
    assert "secret" not in job.error.message
    events = await workshop.queue.events(job.spec.ref)
    assert not [event for event in events if "secret" in (event.message or "")]


async def test_unavailable_model_is_retried(workshop: Workshop) -> None:
    workshop.backend = FailingBackend(ModelUnavailableError("lost its replica"), ModelUnavailableError("and again"))
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_spec(upload=await upload(workshop))))
    assert (job.state, job.attempts) == ("succeeded", 3)
    await until(lambda: workshop.files() == [f"{job.spec.id}-3-audio.wav"])


@pytest.mark.parametrize("error", [ModelUnavailableError("lost its replica"), StorageError("the bucket is away")])
async def test_lasting_unavailability_makes_a_retryable_dead_letter(
    workshop: Workshop, error: StableAudioError
) -> None:
    workshop.backend = FailingBackend(*[error] * 3)
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_spec(upload=await upload(workshop))))
    assert job.error is not None
    assert (job.state, job.attempts, job.error.code, job.is_dead_letter) == ("failed", 3, error.kind, True)
    assert len(workshop.backend.requests) == 3
    assert workshop.queue.store.dead_letters.retry_job(job.spec.ref) is not None
    job = await workshop.until(job, lambda job: job.state == "succeeded")
    assert workshop.backend.last.init_audio is not None
    await until(lambda: len(workshop.files()) == 1)


async def test_job_whose_file_is_damaged_delays_no_other_job(workshop: Workshop) -> None:
    workshop.backend = FailingBackend(DamagedFileError("the stored file is damaged"))
    await workshop.start_runner(pauses=replace(SHORT_PAUSES, retry_s=1e6, last_retry_s=1e6))
    damaged = await workshop.queue.submit(make_spec())
    await workshop.until(damaged, lambda job: job.state == "queued" and job.attempts == 1)
    assert (await workshop.finished(await workshop.queue.submit(make_spec()))).state == "succeeded"


@pytest.mark.parametrize("kind", [OverloadedError, ModelRestartingError])
async def test_full_or_restarting_engine_counts_no_attempt(workshop: Workshop, kind: type[StableAudioError]) -> None:
    workshop.backend = FailingBackend(*[kind("not now", retry_after_s=0.05)] * 5)
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_spec()))
    assert (job.state, job.attempts) == ("succeeded", 1)
    assert len(workshop.backend.requests) == 6


async def test_cancelled_job_makes_room_in_a_full_engine(workshop: Workshop) -> None:
    backend = workshop.backend = FailingBackend()
    backend.released.clear()
    await workshop.start_runner(pauses=replace(SHORT_PAUSES, last_retry_s=600.0))
    long = await workshop.queue.submit(make_spec())
    await until(lambda: backend.num_running == 1)
    backend.errors = [OverloadedError("busy", retry_after_s=600.0)]
    refused = await workshop.queue.submit(make_spec())
    await until(lambda: not backend.errors)
    await workshop.until(refused, lambda job: job.state == "queued")
    await workshop.queue.cancel(long.spec.ref)
    await workshop.until(long, lambda job: job.state == "cancelled")
    backend.released.set()
    assert (await workshop.finished(await workshop.queue.submit(make_spec()))).state == "succeeded"
    assert (await workshop.until(refused, lambda job: job.state == "queued")).attempts == 0


async def test_refused_job_does_not_delay_other_clients(workshop: Workshop) -> None:
    backend = workshop.backend = FailingBackend(OverloadedError("your share is full", retry_after_s=600.0))
    await workshop.start_runner(pauses=replace(SHORT_PAUSES, last_retry_s=600.0))
    refused = await workshop.queue.submit(make_spec(client="alice"))
    await until(lambda: not backend.errors)
    refused = await workshop.until(refused, lambda job: job.state == "queued")
    waiting = await workshop.queue.submit(make_spec(client="alice"))
    other = await workshop.finished(await workshop.queue.submit(make_spec(client="bob")))
    assert other.state == "succeeded"
    for job in (refused, waiting):
        assert (await workshop.until(job, lambda job: job.state == "queued")).attempts == 0
    assert len(backend.requests) == 2


async def test_outcome_is_written_after_a_store_outage(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [StorageError("the disk is full")] * 3

    def flaky(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if failures:
                raise failures.pop()
            return change(*args, **kwargs)

        return call

    store = workshop.queue.store
    monkeypatch.setattr(store.runners, "succeed", flaky(store.runners.succeed))
    await workshop.start_runner()
    assert (await workshop.finished(await workshop.queue.submit(make_spec()))).state == "succeeded"
    assert failures == []


async def test_unknown_model_makes_a_dead_letter_after_retries(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "LEFT_TO_OTHERS_S", 0.0)
    """At first the job is retried: during an update, the runner may be older than the server that accepted the job."""
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_spec(model="retired")))
    assert job.error is not None
    assert (job.error.code, "retired" in job.error.message) == ("unknown_model", True)
    assert (job.attempts, job.is_dead_letter) == (3, True)


@pytest.mark.parametrize("job_settings", [JobSettings(max_attempts=2)])
async def test_unreadable_job_becomes_a_dead_letter_and_blocks_no_other(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "LEFT_TO_OTHERS_S", 0.0)
    bad, good = [await workshop.queue.submit(make_spec()) for _ in range(2)]
    with workshop.queue.store.database.writing() as connection:
        connection.execute(sa.update(JOBS).where(JOBS.c.id == bad.spec.id).values(spec='{"prompt": "rain"}'))
    await workshop.start_runner()
    assert (await workshop.finished(good)).state == "succeeded"
    ended = await workshop.finished(bad)
    assert (ended.state, ended.attempts, ended.is_dead_letter) == ("failed", 2, True)
    assert len(workshop.backend.requests) == 1


async def test_unreadable_job_is_left_to_newer_servers_for_an_hour(workshop: Workshop) -> None:
    job = await workshop.queue.submit(make_spec())
    with workshop.queue.store.database.writing() as connection:
        connection.execute(sa.update(JOBS).where(JOBS.c.id == job.spec.id).values(spec='{"prompt": "rain"}'))
    await workshop.start_runner()
    await until(lambda: workshop.queue.store.clients.events(job.spec.ref, after=0)[-1].message.startswith("put back"))
    left = workshop.queue.store.clients.get(job.spec.ref)
    assert left is not None
    assert (left.state, left.attempts) == ("queued", 0)


@pytest.mark.parametrize("job_settings", [JobSettings(max_attempts=2)])
async def test_generation_that_cancels_itself_costs_an_attempt(workshop: Workshop) -> None:
    class BrokenOff(ToneBackend):
        async def generate(
            self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
        ) -> GenerationResult:
            self.requests.append((model, request))
            raise asyncio.CancelledError

    workshop.backend = BrokenOff()
    await workshop.start_runner()
    ended = await workshop.finished(await workshop.queue.submit(make_spec()))
    assert (ended.state, ended.attempts, ended.is_dead_letter) == ("failed", 2, True)


class StartedBackend(ToneBackend):
    """A test backend that reports the start of each request."""

    async def generate(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
    ) -> GenerationResult:
        assert on_progress is not None
        on_progress(Progress("denoising", 0.1, 1, 8))
        return await super().generate(model, request)


async def test_a_slow_deletion_does_not_delay_other_jobs(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    may_delete = asyncio.Event()
    deleted: list[str] = []

    async def delete(key: str) -> None:
        await may_delete.wait()
        deleted.append(key)

    late = await workshop.queue.submit(make_spec(start_within_s=0.01, upload=await upload(workshop)))
    monkeypatch.setattr(workshop.queue.artifacts, "delete", delete)
    await asyncio.sleep(0.02)
    await workshop.start_runner()
    assert (await workshop.finished(late)).state == "failed"
    job = await workshop.finished(await workshop.queue.submit(make_spec()))
    assert (job.state, deleted) == ("succeeded", [])
    may_delete.set()
    assert late.spec.upload is not None
    await until(lambda: deleted == [late.spec.upload.file.key])


def make_older(workshop: Workshop) -> None:
    """Make all jobs older than PATIENCE_S, so that their limits for the start are over."""
    with workshop.queue.store.database.writing() as connection:
        created_at, start_before = JOBS.c.created_at - PATIENCE_S, JOBS.c.start_before - PATIENCE_S
        connection.execute(sa.update(JOBS).values(created_at=created_at, start_before=start_before))


async def test_job_that_started_in_time_survives_a_stop(workshop: Workshop) -> None:
    workshop.backend = backend = StartedBackend(delay_s=PATIENCE_S, queue_s=0.01)
    job = await workshop.queue.submit(make_spec(start_within_s=PATIENCE_S))
    runner = await workshop.start_runner()
    await until(lambda: backend.num_running == 1)
    await runner.close()
    make_older(workshop)
    backend.delay_s = 0.0
    await workshop.start_runner()
    assert (await workshop.finished(job)).state == "succeeded"


async def test_retried_dead_letter_has_no_limit_for_its_start(workshop: Workshop) -> None:
    workshop.backend = FailingBackend(*[StorageError("the bucket is away")] * 3)
    workshop.backend.queue_s = 0.01
    await workshop.start_runner()
    dead = await workshop.finished(await workshop.queue.submit(make_spec(start_within_s=PATIENCE_S)))
    assert dead.is_dead_letter
    make_older(workshop)
    retried = workshop.queue.store.dead_letters.retry_job(dead.spec.ref)
    assert retried is not None
    assert (await workshop.finished(retried)).state == "succeeded"
