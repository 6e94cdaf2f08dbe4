from __future__ import annotations

import asyncio
import io
import itertools
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import soundfile
import sqlalchemy as sa

from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.core.clock import SystemClock
from stable_audio_serve.core.errors import (
    DeadlineExceededError,
    GenerationError,
    InvalidRequestError,
    ModelUnavailableError,
    OverloadedError,
    StableAudioError,
    StartTimeoutError,
    StorageError,
)
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, ProgressCallback
from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs.runner.pauses import RunnerPauses
from stable_audio_serve.jobs.store.tables import JOBS
from tests.backends import ToneBackend
from tests.jobs.conftest import Workshop, make_spec, upload, wait_for

pytestmark = pytest.mark.slow


class FailingBackend(ToneBackend):
    """Raises these errors one after another, then works."""

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


@dataclass
class CountingBackend(ToneBackend):
    """Remembers how many requests it had at most at a time."""

    most_running: int = 0

    async def generate(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
    ) -> GenerationResult:
        self.most_running = max(self.most_running, self.num_running + 1)
        return await super().generate(model, request)


async def test_a_job_becomes_a_file(workshop: Workshop) -> None:
    await workshop.start_runner()
    accepted = await workshop.queue.submit(make_spec(file_stem="rain"))
    assert (accepted.state, accepted.stage, accepted.started_at) == ("queued", "queued", None)
    job = await workshop.finished(accepted)
    assert job.state == "succeeded"
    assert (job.stage, job.fraction, job.attempts, job.error) == ("done", 1.0, 1, None)
    assert job.started_at is not None
    assert job.completed_at is not None
    assert job.created_at <= job.started_at <= job.completed_at
    result = job.result
    assert result is not None
    assert (result.sample_rate_hz, result.num_outputs, result.seeds) == (44100, 1, (7,))
    assert (result.file.file_name, result.file.media_type) == ("rain.wav", "audio/wav")
    data = b"".join([chunk async for chunk in workshop.queue.read(result.file)])
    assert len(data) == result.file.num_bytes
    assert soundfile.info(io.BytesIO(data)).frames == 44100
    assert workshop.files() == [f"{job.spec.id}-rain.wav"]
    assert await workshop.queue.find_file(result.file_id) == result.file
    events = await workshop.queue.events(job.spec.ref)
    messages = [event.message for event in events if event.message is not None]
    assert messages[:2] == ["queued", "started"]
    assert messages[2].startswith("finished: the generation took")
    assert [event.at for event in events] == sorted(event.at for event in events)


async def test_several_variations_become_a_zip(workshop: Workshop) -> None:
    await workshop.start_runner()
    request = GenerationRequest(prompt="x", duration_s=0.2, seed=1, batch_size=2)
    spec = make_spec(request=request, file_format="flac", file_stem="s")
    job = await workshop.finished(await workshop.queue.submit(spec))
    assert job.result is not None
    assert (job.result.file.file_name, job.result.file.media_type) == ("s-batch.zip", "application/zip")
    assert (job.result.num_outputs, job.result.seeds) == (2, (1, 2))
    archive = Path(workshop.settings.output_dir) / f"{spec.id}-s-batch.zip"
    assert zipfile.ZipFile(archive).namelist() == ["s-01.flac", "s-02.flac"]


async def test_odd_characters_of_an_id_do_not_reach_the_file_name(workshop: Workshop) -> None:
    await workshop.start_runner()
    spec = make_spec(id="0f-1a:stable/../audio")
    job = await workshop.finished(await workshop.queue.submit(spec))
    assert job.state == "succeeded"
    assert workshop.files() == ["0f-1a-stable-..-audio-audio.wav"]


@pytest.mark.parametrize("role", ["init", "inpaint"])
async def test_an_upload_reaches_the_model_and_is_deleted(workshop: Workshop, role: Any) -> None:
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_spec(upload=await upload(workshop, role=role))))
    assert job.state == "succeeded"
    request = workshop.backend.last
    sources = {"init": request.init_audio, "inpaint": request.inpaint_audio}
    source = sources.pop(role)
    assert source is not None
    assert source.samples.shape[1] == 22050
    assert list(sources.values()) == [None]
    await wait_for(lambda: workshop.files() == [f"{job.spec.id}-audio.wav"])


async def test_an_upload_that_is_gone_fails_its_job(workshop: Workshop) -> None:
    kept = await upload(workshop)
    await workshop.queue.artifacts.delete(kept.file.key)
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_spec(upload=kept)))
    assert job.error is not None
    assert (job.state, job.error.code) == ("failed", "storage")


async def test_the_model_is_told_the_job_and_a_time_limit(workshop: Workshop) -> None:
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_spec()))
    assert workshop.backend.last.request_id == job.spec.id
    assert workshop.backend.last.deadline_s == workshop.settings.api.max_deadline_s


async def test_the_engine_gets_what_is_left_of_the_time_to_start_in(workshop: Workshop) -> None:
    class Later(SystemClock):
        def time(self) -> float:
            return super().time() + 60.0

    job = await workshop.queue.submit(make_spec(start_within_s=120.0))
    await workshop.start_runner(clock=Later())
    await workshop.finished(job)
    left_s = workshop.backend.last.start_within_s
    assert left_s is not None
    assert 40.0 < left_s <= 60.0


async def test_late_in_the_engine_s_own_queue_is_late_too(workshop: Workshop) -> None:
    workshop.backend = FailingBackend(StartTimeoutError("it did not start within its 5 s"))
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_spec(start_within_s=5.0)))
    assert job.error is not None
    assert (job.state, job.error.code) == ("failed", "start_timeout")


@pytest.mark.parametrize("job_settings", [JobSettings(max_running=2)])
async def test_no_more_run_at_once_than_may(workshop: Workshop) -> None:
    workshop.backend = backend = CountingBackend(delay_s=0.1)
    jobs = [await workshop.queue.submit(make_spec()) for _ in range(5)]
    await workshop.start_runner()
    for job in jobs:
        await workshop.finished(job)
    assert backend.most_running == 2


@pytest.mark.parametrize("job_settings", [JobSettings(max_running=1)])
async def test_each_priority_has_a_line_and_room_of_its_own(workshop: Workshop) -> None:
    """What goes first is the engine's to know, which is told."""
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


async def test_a_submission_starts_at_once_however_long_the_runner_would_pause(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = count_looks(workshop, monkeypatch)
    await workshop.start_runner(pauses=RunnerPauses(first_poll_s=600.0, last_poll_s=600.0))
    await wait_for(lambda: len(looks) == 1)
    await asyncio.sleep(0.05)
    assert (await workshop.finished(await workshop.queue.submit(make_spec()))).state == "succeeded"


async def test_a_lost_wake_up_costs_only_a_pause(workshop: Workshop) -> None:
    await workshop.start_runner()
    workshop.queue.wake = lambda: None
    assert (await workshop.finished(await workshop.queue.submit(make_spec()))).state == "succeeded"


def count_looks(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When a runner looked into its store, seconds, as they come."""
    looks: list[float] = []
    look = workshop.queue.store.runners.look

    def count(owner: str) -> Any:
        looks.append(time.monotonic())
        return look(owner)

    monkeypatch.setattr(workshop.queue.store.runners, "look", count)
    return looks


async def test_an_idle_runner_hardly_asks_its_store(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = count_looks(workshop, monkeypatch)
    await workshop.start_runner(pauses=RunnerPauses(first_poll_s=0.02, last_poll_s=0.1))
    await wait_for(lambda: len(looks) > 5)
    pauses_s = [later - earlier for earlier, later in itertools.pairwise(looks)]
    assert all(pause_s >= least_s for pause_s, least_s in zip(pauses_s, (0.04, 0.08, 0.1, 0.1, 0.1), strict=False))
    assert RunnerPauses().first_poll_s >= 0.1
    assert RunnerPauses().last_poll_s >= 3.0


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError("steps: at most 9", field="steps"),
        GenerationError("not finite"),
        DeadlineExceededError("too late"),
    ],
)
async def test_a_failure_of_its_own_is_not_retried(workshop: Workshop, error: StableAudioError) -> None:
    workshop.backend = FailingBackend(error)
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_spec(upload=await upload(workshop))))
    assert job.error is not None
    assert (job.state, job.attempts) == ("failed", 1)
    assert (job.error.code, job.error.message, job.error.field) == (error.kind, error.message, error.field)
    await wait_for(lambda: workshop.files() == [])


async def test_an_unexpected_failure_says_nothing_about_itself(workshop: Workshop) -> None:
    workshop.backend = FailingBackend(RuntimeError("/secret/path"))
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_spec()))
    assert job.error is not None
    assert job.error.code == "generation_failed"
    assert "secret" not in job.error.message
    events = await workshop.queue.events(job.spec.ref)
    assert not [event for event in events if "secret" in (event.message or "")]


async def test_a_model_that_is_gone_is_tried_again(workshop: Workshop) -> None:
    workshop.backend = FailingBackend(ModelUnavailableError("lost its replica"), ModelUnavailableError("and again"))
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_spec(upload=await upload(workshop))))
    assert (job.state, job.attempts) == ("succeeded", 3)
    await wait_for(lambda: workshop.files() == [f"{job.spec.id}-3-audio.wav"])


@pytest.mark.parametrize("error", [ModelUnavailableError("lost its replica"), StorageError("the bucket is away")])
async def test_what_stays_away_makes_a_dead_letter_that_can_be_tried_again(
    workshop: Workshop, error: StableAudioError
) -> None:
    workshop.backend = FailingBackend(*[error] * 3)
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_spec(upload=await upload(workshop))))
    assert job.error is not None
    assert (job.state, job.attempts, job.error.code, job.is_dead_letter) == ("failed", 3, error.kind, True)
    assert len(workshop.backend.requests) == 3
    assert workshop.queue.store.operators.retry(job.spec.ref) is not None
    job = await workshop.until(job, lambda job: job.state == "succeeded")
    assert workshop.backend.last.init_audio is not None
    await wait_for(lambda: len(workshop.files()) == 1)


async def test_a_full_engine_costs_patience_but_no_attempt(workshop: Workshop) -> None:
    workshop.backend = FailingBackend(*[OverloadedError("busy", retry_after_s=0.05)] * 5)
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_spec()))
    assert (job.state, job.attempts) == ("succeeded", 1)
    assert len(workshop.backend.requests) == 6


async def test_a_waiting_job_is_cancelled_before_it_starts(workshop: Workshop) -> None:
    job = await workshop.queue.submit(make_spec(upload=await upload(workshop)))
    assert (await workshop.queue.cancel(job.spec.ref._replace(client="other")))[0] == "unknown"
    assert (await workshop.queue.cancel(job.spec.ref))[0] == "removed"
    assert (await workshop.queue.cancel(job.spec.ref))[0] == "already_over"
    await wait_for(lambda: workshop.files() == [])
    await workshop.start_runner()
    await asyncio.sleep(0.1)
    assert workshop.backend.requests == []


@pytest.mark.parametrize("job_settings", [JobSettings(lease_s=600.0)])
async def test_a_running_job_is_stopped_at_the_model_at_once(workshop: Workshop) -> None:
    """Long before the next heartbeat or look."""
    workshop.backend.released.clear()
    await workshop.start_runner(pauses=RunnerPauses(first_poll_s=600.0, last_poll_s=600.0))
    job = await workshop.queue.submit(make_spec(upload=await upload(workshop)))
    await workshop.until(job, lambda job: workshop.backend.num_running > 0)
    assert (await workshop.queue.cancel(job.spec.ref))[0] == "requested"
    job = await workshop.finished(job)
    assert job.error is not None
    assert (job.state, job.error.code) == ("cancelled", "cancelled")
    assert workshop.backend.num_cancelled == 1
    await wait_for(lambda: workshop.files() == [])


async def test_cancelling_one_job_leaves_the_others_alone(workshop: Workshop) -> None:
    workshop.backend.released.clear()
    await workshop.start_runner()
    jobs = [await workshop.queue.submit(make_spec()) for _ in range(3)]
    await wait_for(lambda: workshop.backend.num_running == 3)
    await workshop.queue.cancel(jobs[1].spec.ref)
    assert (await workshop.finished(jobs[1])).state == "cancelled"
    workshop.backend.released.set()
    assert [(await workshop.finished(job)).state for job in jobs] == ["succeeded", "cancelled", "succeeded"]


@pytest.mark.parametrize("job_settings", [JobSettings(max_running=1)])
async def test_a_job_that_cannot_start_in_time_fails(workshop: Workshop) -> None:
    workshop.backend.released.clear()
    await workshop.start_runner()
    first = await workshop.queue.submit(make_spec())
    await wait_for(lambda: workshop.backend.num_running == 1)
    late = await workshop.queue.submit(make_spec(start_within_s=0.1, upload=await upload(workshop)))
    late = await workshop.finished(late)
    workshop.backend.released.set()
    assert late.error is not None
    assert (late.state, late.error.code, late.attempts) == ("failed", "start_timeout", 0)
    assert (await workshop.finished(first)).state == "succeeded"
    await wait_for(lambda: workshop.files() == [f"{first.spec.id}-audio.wav"])


async def test_what_a_dead_runner_left_is_done_by_the_next_when_its_lease_ends(workshop: Workshop) -> None:
    job = await workshop.queue.submit(make_spec(upload=await upload(workshop)))
    assert workshop.queue.store.runners.lease("a dead one", lease_s=0.5) is not None
    await workshop.start_runner()
    job = await workshop.finished(job)
    assert (job.state, job.attempts) == ("succeeded", 2)
    await wait_for(lambda: workshop.files() == [f"{job.spec.id}-2-audio.wav"])


async def test_a_job_that_kills_its_runners_is_given_up(workshop: Workshop) -> None:
    job = await workshop.queue.submit(make_spec())
    store = workshop.queue.store
    for attempt in (1, 2, 3):
        leased = store.runners.lease("a dead one", lease_s=0.0)
        assert leased is not None
        assert leased.attempts == attempt
        if attempt < 3:
            store.runners.reclaim(max_attempts=3)
    await workshop.start_runner()
    job = await workshop.finished(job)
    assert job.error is not None
    assert (job.state, job.error.code, job.is_dead_letter) == ("failed", "unavailable", True)
    assert workshop.backend.requests == []


async def test_a_job_cancelled_while_its_runner_was_dead_is_not_run(workshop: Workshop) -> None:
    job = await workshop.queue.submit(make_spec())
    workshop.queue.store.runners.lease("a dead one", lease_s=0.2)
    assert (await workshop.queue.cancel(job.spec.ref))[0] == "requested"
    await workshop.start_runner()
    assert (await workshop.finished(job)).state == "cancelled"
    assert workshop.backend.requests == []


async def test_a_runner_that_stops_puts_its_jobs_back_at_no_cost(workshop: Workshop) -> None:
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


async def test_an_outcome_waits_for_a_store_that_fails_for_a_while(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
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


async def test_the_loop_survives_a_store_that_fails_for_a_while(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = await workshop.start_runner()
    store, look = workshop.queue.store, workshop.queue.store.runners.look

    num_failures = 0

    def fail(_: str) -> Any:
        nonlocal num_failures
        num_failures += 1
        raise StorageError("the disk is full")

    monkeypatch.setattr(store.runners, "look", fail)
    job = await workshop.queue.submit(make_spec())
    await wait_for(lambda: num_failures >= 3)
    runner.check_health()
    monkeypatch.setattr(store.runners, "look", look)
    assert (await workshop.finished(job)).state == "succeeded"


async def test_a_runner_starts_while_its_store_is_away(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    store = workshop.queue.store
    job = await workshop.queue.submit(make_spec())
    store.runners.lease("a runner that died", lease_s=0.0)

    num_failures = 0

    def fail(*_: Any, **__: Any) -> Any:
        nonlocal num_failures
        num_failures += 1
        raise StorageError("nobody answers")

    with monkeypatch.context() as away:
        for name in ("look", "reclaim", "renew", "lease"):
            away.setattr(store.runners, name, fail)
        runner = await workshop.start_runner()
        await wait_for(lambda: num_failures >= 5)
        runner.check_health()
    assert (await workshop.finished(job)).state == "succeeded"


async def test_a_model_that_is_not_served_makes_a_dead_letter_in_the_end(workshop: Workshop) -> None:
    """Not at once: while servers are replaced, a runner may be older than the ingress that took the job."""
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_spec(model="retired")))
    assert job.error is not None
    assert (job.error.code, "retired" in job.error.message) == ("unknown_model", True)
    assert (job.attempts, job.is_dead_letter) == (3, True)


async def test_source_audio_is_decoded_only_as_far_as_memory_allows(workshop: Workshop) -> None:
    workshop.backend = backend = CountingBackend(delay_s=0.1)
    one = await upload(workshop)
    api = workshop.settings.api.model_copy(update={"max_source_bytes": int(2.5 * one.decoded_bytes)})
    workshop.settings = workshop.settings.model_copy(update={"api": api})
    jobs = [await workshop.queue.submit(make_spec(upload=one))]
    jobs += [await workshop.queue.submit(make_spec(upload=await upload(workshop))) for _ in range(3)]
    await workshop.start_runner()
    assert [(await workshop.finished(job)).state for job in jobs] == ["succeeded"] * 4
    assert backend.most_running == 2


async def test_a_runner_of_a_server_that_stops_gives_its_jobs_back_and_stays_healthy(workshop: Workshop) -> None:
    workshop.backend = backend = ToneBackend(delay_s=30)
    jobs = [await workshop.queue.submit(make_spec()) for _ in range(2)]
    runner = await workshop.start_runner()
    await wait_for(lambda: backend.num_running == 2)
    await wait_for(lambda: not runner.drain())
    for job in jobs:
        now = workshop.queue.store.clients.get(job.spec.ref)
        assert now is not None
        assert (now.state, now.attempts) == ("queued", 0)
    runner.wake()
    await asyncio.sleep(0.1)
    assert backend.num_running == 0  # nothing is taken again
    runner.check_health()


async def test_a_health_check_tells_of_a_loop_that_ended(workshop: Workshop) -> None:
    runner = await workshop.start_runner()
    runner.check_health()
    await runner.close()
    with pytest.raises(GenerationError):
        runner.check_health()


@pytest.mark.parametrize("job_settings", [JobSettings(max_attempts=2)])
async def test_a_job_of_another_version_is_tried_again_then_set_aside_and_holds_up_no_other(
    workshop: Workshop,
) -> None:
    bad, good = [await workshop.queue.submit(make_spec()) for _ in range(2)]
    with workshop.queue.store.database.writing() as connection:
        connection.execute(sa.update(JOBS).where(JOBS.c.id == bad.spec.id).values(spec='{"prompt": "rain"}'))
    await workshop.start_runner()
    assert (await workshop.finished(good)).state == "succeeded"
    ended = await workshop.finished(bad)
    assert (ended.state, ended.attempts, ended.is_dead_letter) == ("failed", 2, True)
    assert len(workshop.backend.requests) == 1


@pytest.mark.parametrize("job_settings", [JobSettings(max_attempts=2)])
async def test_work_that_is_broken_off_by_itself_costs_an_attempt(workshop: Workshop) -> None:
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


async def test_a_published_file_stays_when_only_the_answer_of_the_database_got_lost(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = workshop.queue.store.files.publish

    def cut(file: StoredFile, *, file_id: str | None) -> str:
        publish(file, file_id=file_id)
        raise StorageError("the connection was cut after the commit")

    monkeypatch.setattr(workshop.queue.store.files, "publish", cut)
    with pytest.raises(StorageError):
        await workshop.queue.publish(lambda: [b"x"], media_type="audio/wav", file_name="a.wav", file_id="mine")
    found = await workshop.queue.find_file("mine")
    assert found is not None
    assert [chunk async for chunk in workshop.queue.read(found)] == [b"x"]
