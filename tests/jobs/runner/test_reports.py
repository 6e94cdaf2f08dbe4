"""What a job runner reports: the progress of its jobs, and the work that is waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, Progress, ProgressCallback
from stable_audio_serve.core.settings import JobSettings
from tests.backends import ToneBackend
from tests.jobs.conftest import Workshop, make_spec
from tests.patience import until

pytestmark = pytest.mark.server


class ReportingBackend(ToneBackend):
    """A test backend that reports whatever progress the test sets."""

    def __init__(self) -> None:
        super().__init__()
        self.released.clear()
        self.callbacks: list[ProgressCallback] = []

    async def generate(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
    ) -> GenerationResult:
        assert on_progress is not None
        self.callbacks.append(on_progress)
        return await super().generate(model, request)


@pytest.fixture
def reporting(workshop: Workshop) -> ReportingBackend:
    workshop.backend = backend = ReportingBackend()
    return backend


def denoised(share: float) -> Progress:
    return Progress("denoising", share)


async def test_progress_of_all_jobs_is_written_together(
    workshop: Workshop, reporting: ReportingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, written = workshop.queue.store.runners, list[int]()
    report = store.report

    def count(reports: Any) -> Any:
        written.append(len(reports))
        return report(reports)

    monkeypatch.setattr(store, "report", count)
    jobs = [await workshop.queue.submit(make_spec()) for _ in range(4)]
    await workshop.start_runner()
    await until(lambda: len(reporting.callbacks) == 4)
    for step in range(1, 11):
        for callback in reporting.callbacks:
            callback(denoised(step / 10))
    for job in jobs:
        await workshop.until(job, lambda job: job.fraction == pytest.approx(0.95))
        events = await workshop.queue.events(job.spec.ref)
        assert [event.fraction for event in events] == [0.0, 0.0, pytest.approx(0.95)]
    assert written == [4]
    reporting.released.set()
    for job in jobs:
        assert (await workshop.finished(job)).fraction == 1.0


@pytest.mark.parametrize("job_settings", [JobSettings(lease_s=600.0)])
async def test_report_that_finds_the_lease_lost_stops_the_work(workshop: Workshop, reporting: ReportingBackend) -> None:
    await workshop.start_runner()
    lost, kept = [await workshop.queue.submit(make_spec()) for _ in range(2)]
    await until(lambda: len(reporting.callbacks) == 2)
    lost = await workshop.until(lost, lambda job: job.state == "running")
    workshop.queue.store.runners.requeue(lost, delay_s=600.0, attempts=0, message="taken away")
    for callback in reporting.callbacks:
        callback(denoised(0.5))
    await until(lambda: reporting.num_cancelled == 1)
    now = await workshop.queue.get(lost.spec.ref)
    assert now is not None
    assert (now.state, now.fraction) == ("queued", 0.0)
    reporting.released.set()
    assert (await workshop.finished(kept)).state == "succeeded"


async def test_progress_is_written_after_a_store_outage(
    workshop: Workshop, reporting: ReportingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    await workshop.start_runner()
    job = await workshop.queue.submit(make_spec())
    await until(lambda: len(reporting.callbacks) == 1)
    failed: list[Any] = []

    def fail(reports: Any) -> Any:
        failed.append(reports)
        raise StorageError("no answer")

    with monkeypatch.context() as away:
        away.setattr(workshop.queue.store.runners, "report", fail)
        reporting.callbacks[0](denoised(0.1))
        await until(lambda: bool(failed))
    reporting.callbacks[0](denoised(0.2))
    await workshop.until(job, lambda job: job.fraction == pytest.approx(0.19))
    reporting.released.set()
    assert (await workshop.finished(job)).state == "succeeded"


async def test_waiting_work_is_unknown_during_a_store_outage(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stable_audio_serve.jobs.runner.runner._SUM_EVERY_S", 0.02)
    store, num_asked = workshop.queue.store, 0
    by_model = store.operators.waiting_work

    def count() -> Any:
        nonlocal num_asked
        num_asked += 1
        return by_model()

    monkeypatch.setattr(store.operators, "waiting_work", count)
    runner = await workshop.start_runner()
    assert runner.waiting_work() is None
    await until(lambda: runner.waiting_work() == {})
    assert num_asked == 0
    runner.hold()
    for _ in range(3):
        await workshop.queue.submit(make_spec(model="medium"))
    await until(lambda: sizes(runner.waiting_work) == {"medium": 3})

    def fail() -> Any:
        raise StorageError("no answer")

    with monkeypatch.context() as away:
        away.setattr(store.operators, "waiting_work", fail)
        await until(lambda: runner.waiting_work() is None)
    await until(lambda: sizes(runner.waiting_work) == {"medium": 3})
    runner.resume()
    await until(lambda: runner.waiting_work() == {})


def sizes(waiting_work: Callable[[], Any]) -> dict[str, int]:
    return {model: waiting.num_jobs for model, waiting in (waiting_work() or {}).items()}


async def test_failed_background_work_is_repeated(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example of background work is the sweep, which deletes old files.

    The pauses between sweeps vary at random, so that not all runners sweep at once.
    """
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def skip(seconds: float) -> None:
        if seconds < 100.0:
            await sleep(seconds)
        else:
            pauses.append(seconds)
            await sleep(0.01)

    num_swept = 0

    async def fail(_: Any) -> Any:
        nonlocal num_swept
        num_swept += 1
        raise RuntimeError("a bug")

    monkeypatch.setattr("stable_audio_serve.jobs.runner.runner.Sweeper.sweep", fail)
    monkeypatch.setattr("stable_audio_serve.jobs.runner.runner.asyncio.sleep", skip)
    await workshop.start_runner()
    await until(lambda: num_swept >= 8)
    assert 300 <= min(pauses) < max(pauses) <= 900  # ten minutes on average
    assert len({round(pause_s) for pause_s in pauses}) > 3
