"""How a job runner executes a job: the request that it sends to the model, and the file that it stores."""

from __future__ import annotations

import io
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import soundfile
import sqlalchemy as sa

from stable_audio_serve.audio import workers
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.core.sound import AudioFormat, Encoding
from stable_audio_serve.jobs.store.tables import JOBS
from tests.jobs.conftest import CountingBackend, Workshop, make_spec, upload
from tests.patience import until

pytestmark = pytest.mark.server


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
    assert (result.sample_rate_hz, result.seeds) == (44100, (7,))
    assert (result.file.file_name, result.file.media_type) == ("rain.wav", "audio/wav")
    data = b"".join([chunk async for chunk in workshop.queue.artifacts.read(result.file)])
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
    spec = make_spec(request=request, encoding=Encoding(AudioFormat.FLAC), file_stem="s")
    job = await workshop.finished(await workshop.queue.submit(spec))
    assert job.result is not None
    assert (job.result.file.file_name, job.result.file.media_type) == ("s-batch.zip", "application/zip")
    assert job.result.seeds == (1, 2)
    archive = Path(workshop.settings.output_dir) / f"{spec.id}-s-batch.zip"
    assert zipfile.ZipFile(archive).namelist() == ["s-01.flac", "s-02.flac"]


async def test_special_characters_of_an_id_are_not_in_the_file_name(workshop: Workshop) -> None:
    await workshop.start_runner()
    spec = make_spec(id="0f-1a:stable/../audio")
    job = await workshop.finished(await workshop.queue.submit(spec))
    assert job.state == "succeeded"
    assert workshop.files() == ["0f-1a-stable-..-audio-audio.wav"]


@pytest.mark.parametrize("role", ["init", "inpaint"])
async def test_upload_reaches_the_model_and_is_deleted(workshop: Workshop, role: Any) -> None:
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_spec(upload=await upload(workshop, role=role))))
    assert job.state == "succeeded"
    request = workshop.backend.last
    sources = {"init": request.init_audio, "inpaint": request.inpaint_audio}
    source = sources.pop(role)
    assert source is not None
    assert source.samples.shape[1] == 22050
    assert list(sources.values()) == [None]
    await until(lambda: workshop.files() == [f"{job.spec.id}-audio.wav"])


async def test_request_has_the_job_id_and_a_deadline(workshop: Workshop) -> None:
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_spec()))
    assert workshop.backend.last.request_id == job.spec.id
    assert workshop.backend.last.deadline_s == workshop.settings.api.max_deadline_s


@pytest.mark.parametrize("now", [time.time, lambda: time.time() - 3600.0], ids=["same clock", "other clock"])
async def test_engine_gets_the_remaining_time_to_start(workshop: Workshop) -> None:
    """The database server's clock may be wrong."""
    job = await workshop.queue.submit(make_spec(start_within_s=120.0))
    with workshop.queue.store.database.writing() as connection:
        connection.execute(sa.update(JOBS).values(created_at=JOBS.c.created_at - 60.0))
    await workshop.start_runner()
    await workshop.finished(job)
    left_s = workshop.backend.last.start_within_s
    assert left_s is not None
    assert 40.0 < left_s <= 60.0


async def test_job_without_a_temporary_folder_keeps_its_upload(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = await upload(workshop)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
        await workshop.start_runner()
        job = await workshop.finished(await workshop.queue.submit(make_spec(upload=kept)))
    assert job.error is not None
    assert (job.state, job.error.message) == ("failed", "there is no room for temporary files")
    assert job.is_dead_letter
    retried = workshop.queue.store.dead_letters.retry_job(job.spec.ref)
    assert retried is not None
    assert (await workshop.finished(retried)).state == "succeeded"


async def test_decoding_of_sources_waits_for_memory(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.backend = backend = CountingBackend(delay_s=0.1)
    backend.released.clear()
    one = await upload(workshop)
    monkeypatch.setattr(workers, "MAX_SOURCE_BYTES", int(2.5 * one.decoded_bytes))
    jobs = [await workshop.queue.submit(make_spec(upload=one))]
    jobs += [await workshop.queue.submit(make_spec(upload=await upload(workshop))) for _ in range(3)]
    await workshop.start_runner()
    await until(lambda: backend.num_running == 2)
    backend.released.set()
    assert [(await workshop.finished(job)).state for job in jobs] == ["succeeded"] * 4
    assert backend.most_running == 2
