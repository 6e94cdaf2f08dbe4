"""Long pieces: sections that are made one after the other, stored one by one, and joined to one file."""

from __future__ import annotations

import io
from typing import Any

import pytest
import soundfile

from stable_audio_serve.core.generation import GenerationRequest, Section
from stable_audio_serve.jobs.job import JobSpec
from tests.jobs.conftest import Workshop, make_spec

pytestmark = pytest.mark.server


def make_long(*durations_s: float, overlap_s: float = 0.5, **overrides: Any) -> JobSpec:
    sections = tuple(Section(duration_s) for duration_s in durations_s)
    request = GenerationRequest(prompt="rain", duration_s=sum(durations_s), seed=7)
    return make_spec(request=request, mode="long-piece", sections=sections, overlap_s=overlap_s, **overrides)


async def read(workshop: Workshop, file: Any) -> bytes:
    return b"".join([chunk async for chunk in workshop.queue.read(file)])


async def test_sections_become_one_file(workshop: Workshop) -> None:
    await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_long(1.0, 2.0, 1.5, with_recipe=True)))
    assert job.state == "succeeded", job.error
    assert job.result is not None
    data = await read(workshop, job.result.file)
    samples, rate_hz = soundfile.read(io.BytesIO(data))
    assert (len(samples), rate_hz) == (int(4.5 * 44100), 44100)
    requests = [request for _, request in workshop.backend.requests]
    assert [request.seed for request in requests] == [7, 8, 9]
    assert [request.inpaint_audio is None for request in requests] == [True, False, False]
    finished = await workshop.queue.sections(job.spec.ref)
    assert [section.number for section in finished] == [1, 2, 3]
    source = requests[2].inpaint_audio
    assert source is not None
    assert source.samples.shape == (2, 22050)
    assert requests[2].inpaint_regions_s[0][0] == 0.5
