"""How a job runner makes a long piece: it makes and stores each section, then joins all sections in one file."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import sqlalchemy as sa

from stable_audio_serve.artifacts.store import Chunks, StoredFile
from stable_audio_serve.core.errors import DeadlineExceededError, GenerationError, StorageError
from stable_audio_serve.core.generation import GenerationRequest, Section
from stable_audio_serve.core.ids import ArtifactKey, ClientId
from stable_audio_serve.core.keys import KeyLimits
from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.core.sound import Finishing, Loudness
from stable_audio_serve.jobs.job import JobSpec
from stable_audio_serve.jobs.pieces.sections import LostSectionError, read_section
from stable_audio_serve.jobs.runner.sweeper import Sweeper
from stable_audio_serve.jobs.store.key_uses import Use
from stable_audio_serve.jobs.store.sections import Sections
from stable_audio_serve.jobs.store.tables import JOBS
from tests.backends import PausingBackend
from tests.jobs.conftest import Workshop, make_spec
from tests.jobs.runner.test_reports import ReportingBackend, denoised
from tests.parameters import slow
from tests.patience import until

pytestmark = pytest.mark.server

RATE_HZ = 44100
JOIN = round(0.03 * RATE_HZ)


def make_long(*durations_s: float, overlap_s: float = 0.5, **overrides: Any) -> JobSpec:
    sections = tuple(Section(duration_s) for duration_s in durations_s)
    request = GenerationRequest(prompt="rain", duration_s=sum(durations_s), seed=7)
    return make_spec(request=request, mode="long-piece", sections=sections, overlap_s=overlap_s, **overrides)


async def audio_of(workshop: Workshop, file: StoredFile) -> npt.NDArray[np.float32]:
    data = b"".join([chunk async for chunk in workshop.queue.artifacts.read(file)])
    samples, rate_hz = soundfile.read(io.BytesIO(data), dtype="float32")
    assert rate_hz == RATE_HZ
    return np.asarray(samples)


async def test_sections_become_one_file(workshop: Workshop) -> None:
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_long(1.0, 2.0, 1.5)))
    assert job.state == "succeeded", job.error
    assert job.result is not None
    finished = await workshop.queue.sections(job.spec.ref)
    assert [section.number for section in finished] == [1, 2, 3]
    first, second, third = [await audio_of(workshop, section.file) for section in finished]
    assert [len(part) for part in (first, second, third)] == [44100, 88200 + JOIN, 66150 + JOIN]
    whole = await audio_of(workshop, job.result.file)
    assert whole.shape == (int(4.5 * RATE_HZ), 2)
    np.testing.assert_allclose(whole, np.concatenate([first[:-JOIN], second[:-JOIN], third]), atol=1 / 32768)
    (clip,) = job.result.file.clips
    assert (clip.seed, clip.peak) == (7, pytest.approx(0.5, abs=1e-3))


async def test_durations_are_added_up_without_rounding_errors(workshop: Workshop) -> None:
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_long(1.4, 1.4, 1.4)))
    assert job.result is not None
    assert len(await audio_of(workshop, job.result.file)) == int(4.2 * RATE_HZ)


async def test_loudness_and_fades_are_those_of_the_whole(workshop: Workshop) -> None:
    await workshop.start_runner()
    finishing = Finishing(Loudness(-20.0), fade_in_s=0.5, fade_out_s=1.0)
    job = await workshop.finished(await workshop.queue.submit(make_long(1.0, 4.0, 3.0, finishing=finishing)))
    assert job.result is not None, job.error
    (clip,) = job.result.file.clips
    assert clip.loudness_lufs == pytest.approx(-20.0, abs=0.5)  # it was -20 before the fades
    assert clip.true_peak_dbtp is not None
    whole = await audio_of(workshop, job.result.file)
    assert len(whole) == 8 * RATE_HZ
    middle = np.abs(whole[RATE_HZ : 6 * RATE_HZ]).max()
    for quiet in (whole[: RATE_HZ // 10], whole[-RATE_HZ // 10 :]):
        assert np.abs(quiet).max() < 0.25 * middle


async def test_each_section_continues_the_stored_end_of_the_one_before(workshop: Workshop) -> None:
    await workshop.start_runner()
    spec = make_long(1.0, 1.0, 2.0, overlap_s=1.5)
    job = await workshop.finished(await workshop.queue.submit(spec))
    requests = [request for _, request in workshop.backend.requests]
    assert [request.seed for request in requests] == [7, 8, 9]
    sources = [request.inpaint_audio for request in requests]
    assert sources[0] is None
    assert sources[1] is not None
    assert sources[2] is not None
    finished = [await audio_of(workshop, section.file) for section in await workshop.queue.sections(job.spec.ref)]
    assert sources[1].samples.tobytes() == np.ascontiguousarray(finished[0].T).tobytes()
    before = np.concatenate([finished[0][:-JOIN], finished[1]])[-int(1.5 * RATE_HZ) :]
    np.testing.assert_array_equal(sources[2].samples, before.T)
    assert requests[2].inpaint_regions_s == ((1.5, pytest.approx(3.5, abs=1e-4)),)


async def test_progress_includes_the_section_that_is_being_made(workshop: Workshop) -> None:
    workshop.backend = backend = ReportingBackend()
    await workshop.start_runner()
    job = await workshop.queue.submit(make_long(1.0, 2.0, 1.0))
    await until(lambda: len(backend.callbacks) == 1)
    backend.callbacks[0](denoised(0.5))
    # The model makes a second more of all sections but the last, and half a second of overlap with the one before.
    expected = 0.95 * 0.5 * 2.0 / (2.0 + 3.5 + 1.5)
    await workshop.until(job, lambda job: job.fraction == pytest.approx(expected, rel=1e-3))
    backend.released.set()
    assert (await workshop.finished(job)).fraction == 1.0


async def test_failed_job_keeps_its_finished_sections(workshop: Workshop) -> None:
    workshop.backend = PausingBackend(num_free=1)
    await workshop.start_runner()
    job = await workshop.queue.submit(make_long(1.0, 1.0))
    await until(lambda: not workshop.backend.released.is_set())
    workshop.backend.error = GenerationError("broken")
    workshop.backend.released.set()
    job = await workshop.finished(job)
    assert (job.state, job.num_sections) == ("failed", 1)
    assert [section.number for section in await workshop.queue.sections(job.spec.ref)] == [1]


async def test_cancelled_job_keeps_its_finished_sections(workshop: Workshop) -> None:
    workshop.backend = PausingBackend(num_free=2)
    await workshop.start_runner()
    job = await workshop.queue.submit(make_long(*[1.0] * 50))
    await until(lambda: not workshop.backend.released.is_set())
    await workshop.queue.cancel(job.spec.ref)
    job = await workshop.finished(job)
    assert (job.state, job.result) == ("cancelled", None)
    finished = await workshop.queue.sections(job.spec.ref)
    assert len(finished) == job.num_sections == 2
    assert len(await audio_of(workshop, finished[0].file)) == RATE_HZ
    await until(lambda: len(workshop.files()) == len(finished))


async def test_lost_lease_adds_no_section(workshop: Workshop) -> None:
    runner = await workshop.start_runner()
    workshop.backend.released.clear()
    job = await workshop.queue.submit(make_long(1.0, 1.0))
    await until(lambda: workshop.backend.num_running == 1)
    runner.hold()
    with workshop.queue.store.database.writing() as connection:  # as if another runner had taken the job over
        connection.execute(sa.update(JOBS).values(fence=JOBS.c.fence + 1, owner="other"))
    workshop.backend.released.set()
    await until(lambda: not workshop.backend.num_running and runner.num_held == 0)
    assert await workshop.queue.sections(job.spec.ref) == []
    assert workshop.files() == []
    now = await workshop.queue.get(job.spec.ref)
    assert now is not None
    assert (now.state, now.num_sections) == ("running", 0)


async def test_section_that_was_added_without_an_answer_keeps_its_file(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Sections.add

    def add_silently(*args: Any, **fields: Any) -> None:
        add(*args, **fields)

    monkeypatch.setattr(Sections, "add", add_silently)
    runner = await workshop.start_runner()
    job = await workshop.queue.submit(make_long(1.0, 1.0))
    await until(lambda: workshop.backend.requests and runner.num_held == 0)
    (section,) = await workshop.queue.sections(job.spec.ref)
    assert workshop.files() == [section.file.key]


async def test_refused_file_costs_only_its_own_section(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    put, refused = workshop.queue.artifacts.put, []

    async def refuse_once(key: ArtifactKey, chunks: Chunks, *, media_type: str, file_name: str) -> StoredFile:
        if file_name.endswith("-2.wav") and not refused:
            refused.append(key)
            raise StorageError("no answer")
        return await put(key, chunks, media_type=media_type, file_name=file_name)

    monkeypatch.setattr(workshop.queue.artifacts, "put", refuse_once)
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_long(1.0, 1.0, 1.0)))
    assert (job.state, job.attempts, len(refused)) == ("succeeded", 1, 1)
    assert [request.seed for _, request in workshop.backend.requests] == [7, 8, 8, 9]


@pytest.mark.parametrize("job_settings", [JobSettings(max_attempts=2)])
async def test_attempts_before_a_finished_section_do_not_count(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, refused = workshop.queue.artifacts.put, set()

    async def refuse_first(key: ArtifactKey, chunks: Chunks, *, media_type: str, file_name: str) -> StoredFile:
        if file_name not in refused:
            refused.add(file_name)
            raise StorageError("no answer")
        return await put(key, chunks, media_type=media_type, file_name=file_name)

    monkeypatch.setattr(workshop.queue.artifacts, "put", refuse_first)
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_long(1.0, 1.0, 1.0, 1.0)))
    assert (job.state, len(refused)) == ("succeeded", 5), job.error  # four sections and the piece


@pytest.mark.parametrize("job_settings", [JobSettings(max_attempts=2)])
async def test_section_that_always_fails_makes_a_dead_letter(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, refused = workshop.queue.artifacts.put, []

    async def refuse(key: ArtifactKey, chunks: Chunks, *, media_type: str, file_name: str) -> StoredFile:
        if file_name.endswith("-3.wav"):
            refused.append(key)
            raise StorageError("no answer")
        return await put(key, chunks, media_type=media_type, file_name=file_name)

    monkeypatch.setattr(workshop.queue.artifacts, "put", refuse)
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_long(1.0, 1.0, 1.0)))
    assert (job.is_dead_letter, job.num_sections, len(refused)) == (True, 2, 2)


@pytest.mark.parametrize("job_settings", [JobSettings(max_attempts=2)])
async def test_storage_that_always_loses_sections_makes_a_dead_letter(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = workshop.queue.artifacts.put

    async def lose(key: ArtifactKey, chunks: Chunks, *, media_type: str, file_name: str) -> StoredFile:
        stored = await put(key, chunks, media_type=media_type, file_name=file_name)
        await workshop.queue.artifacts.delete(key)
        return stored

    monkeypatch.setattr(workshop.queue.artifacts, "put", lose)
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_long(1.0, 1.0)))
    assert (job.is_dead_letter, [request.seed for _, request in workshop.backend.requests]) == (True, [7, 7])


def overwrite(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    # 1 is read when the piece is assembled, 2 before section 3 is generated. Large files are verified at their end.
    ("number", "damage", "seconds"),
    [
        (1, overwrite, 1.0),
        (1, overwrite, 6.0),
        (2, Path.unlink, 1.0),
        slow(1, Path.unlink, 1.0),
        slow(2, overwrite, 1.0),
    ],
)
async def test_lost_section_and_those_after_it_are_made_again(
    workshop: Workshop, number: int, damage: Callable[[Path], None], *, seconds: float
) -> None:
    workshop.backend = PausingBackend(num_free=2)
    runner = await workshop.start_runner()
    job = await workshop.queue.submit(make_long(*[seconds] * 4))
    await until(lambda: not workshop.backend.released.is_set())
    await runner.close()
    workshop.backend.released.set()
    before = await workshop.queue.sections(job.spec.ref)
    damage(Path(workshop.settings.output_dir) / before[number - 1].file.key)
    await workshop.start_runner()
    job = await workshop.finished(job)
    assert (job.state, job.attempts, job.num_sections) == ("succeeded", 1, 4), job.error
    assert job.result is not None
    finished = await workshop.queue.sections(job.spec.ref)
    kept = [old.file.key == new.file.key for old, new in zip(before, finished, strict=False)]
    assert kept[:2] == [number > 1, False]
    messages = [event.message for event in await workshop.queue.events(job.spec.ref) if event.message]
    assert f"the file of section {number} is gone or damaged" in " ".join(messages)
    assert messages.count("started") == 3  # of both runners, and after the loss
    other = await workshop.finished(await workshop.queue.submit(make_long(*[seconds] * 4)))
    assert other.result is not None
    assert job.result.file.sha256 == other.result.file.sha256


async def test_damaged_section_gives_no_samples_that_are_not_finite(workshop: Workshop) -> None:
    """LAME ends the process for such samples. The file is too large to be verified before it is decoded."""
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_long(6.0)))
    (section,) = await workshop.queue.sections(job.spec.ref)
    path = Path(workshop.settings.output_dir) / section.file.key
    num_samples = section.num_samples
    for damaged in (np.nan, np.inf, -1e38):
        path.write_bytes(bytes(58) + np.full(2 * num_samples, damaged, np.float32).tobytes())
        with pytest.raises(LostSectionError):  # before the first block
            await anext(read_section(workshop.queue.artifacts.read, section, stop=num_samples))


class TestQuota:
    """A long piece is charged to the client's key section by section, each when it is generated."""

    @pytest.fixture
    def now(self) -> Callable[[], float]:
        self.time_s = 1_000_000.0
        return lambda: self.time_s

    async def test_job_waits_for_the_next_minute_of_its_key(self, workshop: Workshop) -> None:
        await workshop.start_runner()
        limits = KeyLimits(audio_seconds_per_minute=2.5)
        job = await workshop.queue.submit(make_long(1.0, 1.0, 1.0, client=ClientId("c"), limits=limits))
        job = await workshop.until(job, lambda job: job.num_sections == 2 and job.state == "queued")
        assert (job.attempts, job.stage) == (0, "queued")
        assert job.fraction > 0.5
        other = await workshop.finished(await workshop.queue.submit(make_spec(client=ClientId("d"))))
        assert other.state == "succeeded"
        messages = [event.message for event in await workshop.queue.events(job.spec.ref) if event.message]
        assert messages[-1].startswith("put back: this key has used up its seconds of audio for this minute")
        self.time_s += 61.0
        job = await workshop.finished(job)
        assert (job.state, job.attempts) == ("succeeded", 1)
        assert [request.seed for _, request in workshop.backend.requests if request.seed > 7] == [8, 9]

    async def test_start_deadline_does_not_end_a_piece_that_has_started(self, workshop: Workshop) -> None:
        await workshop.start_runner()
        limits = KeyLimits(audio_seconds_per_minute=1.5)
        spec = make_long(1.0, 1.0, client=ClientId("c"), limits=limits, start_within_s=5.0)
        job = await workshop.queue.submit(spec)
        await workshop.until(job, lambda job: job.num_sections == 1 and job.state == "queued")
        self.time_s += 61.0
        assert (await workshop.finished(job)).state == "succeeded"

    async def test_interrupted_section_is_not_charged(self, workshop: Workshop) -> None:
        first = await workshop.start_runner()
        workshop.backend.released.clear()
        limits = KeyLimits(audio_seconds_per_minute=2.5)
        job = await workshop.queue.submit(make_long(1.0, 1.0, client=ClientId("c"), limits=limits))
        await until(lambda: workshop.backend.num_running == 1)
        await first.close()
        workshop.backend.released.set()
        await workshop.start_runner()
        job = await workshop.finished(job)  # time stands still, so a charge of the first attempt would still count
        assert (job.state, job.attempts) == ("succeeded", 1)

    @pytest.mark.parametrize("error", [None, DeadlineExceededError("too late")], ids=["cancelled", "late"])
    async def test_section_that_the_client_stopped_is_charged(
        self, workshop: Workshop, error: DeadlineExceededError | None
    ) -> None:
        await workshop.start_runner()
        workshop.backend.released.clear()
        limits = KeyLimits(audio_seconds_per_minute=2.5)
        job = await workshop.queue.submit(make_long(2.0, 1.0, client=ClientId("c"), limits=limits))
        await until(lambda: workshop.backend.num_running == 1)
        if error is None:
            await workshop.queue.cancel(job.spec.ref)
        workshop.backend.error = error
        workshop.backend.released.set()
        await workshop.finished(job)
        use = Use(id="1", client=ClientId("c"), limits=limits, audio_s=1.0, has_place=False)
        assert workshop.queue.store.key_uses.audio_s(use) == 2.0


class TestSweeping:
    @pytest.fixture
    def job_settings(self) -> JobSettings:
        return JobSettings(retention_s=100.0, orphan_after_s=100.0)

    @pytest.fixture
    def now(self) -> Callable[[], float]:
        self.time_s = 1_000_000.0
        return lambda: self.time_s

    async def test_files_of_sections_go_with_their_job(self, workshop: Workshop) -> None:
        await workshop.start_runner()
        job = await workshop.finished(await workshop.queue.submit(make_long(1.0, 1.0)))
        assert len(workshop.files()) == 3
        store, artifacts = workshop.queue.store, workshop.queue.artifacts
        orphan = await artifacts.put(
            ArtifactKey("sections/" + "0" * 32), lambda: [b"x"], media_type="audio/wav", file_name="x"
        )
        sweeper = Sweeper(store, artifacts, settings=workshop.settings.jobs)
        assert (await sweeper.sweep())["old"] == 0
        assert len(workshop.files()) == 4 + 1  # 3 of the job, the orphan, and the name of the store's owner
        self.time_s += 101.0
        assert (await sweeper.sweep())["old"] == 3
        assert await workshop.queue.get(job.spec.ref) is None
        assert orphan.key in workshop.files()

    async def test_only_orphans_among_the_sections_are_swept(self, workshop: Workshop) -> None:
        await workshop.start_runner()
        store, artifacts = workshop.queue.store, workshop.queue.artifacts
        await asyncio.to_thread(artifacts.claim, await asyncio.to_thread(store.identity))
        await workshop.finished(await workshop.queue.submit(make_long(1.0, 1.0)))
        key = ArtifactKey("sections/" + "0" * 32)
        await artifacts.put(key, lambda: [b"x"], media_type="audio/wav", file_name="x")
        before = workshop.files()

        class Later:
            def monotonic(self) -> float:
                return 0.0

            def time(self) -> float:
                return max(path.stat().st_mtime for path in Path(workshop.settings.output_dir).iterdir()) + 200.0

        sweeper = Sweeper(store, artifacts, settings=workshop.settings.jobs, clock=Later())
        assert (await sweeper.sweep())["orphans"] == 1
        assert workshop.files() == [name for name in before if name != key]
