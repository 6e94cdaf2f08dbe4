"""Long pieces of the demo: the sections join without a step, and the sound does not drift."""

from __future__ import annotations

import asyncio
import io

import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from stable_audio_serve.audio.loudness import measure_loudness
from stable_audio_serve.core.catalog import ModelCatalog
from stable_audio_serve.core.generation import GenerationRequest, Section
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.registry import describe_entry, resolve_entry
from stable_audio_serve.serving.local import LocalBackend
from tests.jobs.conftest import Workshop, make_spec

pytestmark = [pytest.mark.server, pytest.mark.slow]

RATE_HZ = 44100
OWN_S = 6.0
NUM_SECTIONS = 10
WINDOW_S = 2.0  # a bar at 120 bpm, so that every window contains the same beats
PROMPTS = (
    "sine tone at 440 Hz",
    "organ tone at 220 Hz",
    "white noise",
    "rain",
    "G major chord on organ",
    "pad tone at A#2",
    "wind",
    "drum loop 120 bpm",
    "house beat at 122 beats per minute",
    "arpeggio C minor on saw at 105 bpm",
)

Audio = npt.NDArray[np.float32]


async def test_seams_are_no_larger_than_changes_inside_and_nothing_drifts(workshop: Workshop) -> None:
    entry = resolve_entry("demo")
    engine = Engine(load_model(entry), EngineOptions(mode="strict", torch_threads=1, warmup_budget_s=0.0))
    seams: list[tuple[float, float]] = []
    inside: list[tuple[float, float]] = []
    async with LocalBackend(ModelCatalog([describe_entry(entry).card]), {"demo": engine}) as backend:
        workshop.backend = backend  # type: ignore[assignment]
        await workshop.start_runner()
        for number, prompt in enumerate(PROMPTS):
            audio = await make(workshop, prompt, seed=100 * number)
            own = int(OWN_S * RATE_HZ)
            seams += [change(audio, at * own) for at in range(1, NUM_SECTIONS)]
            places = np.linspace(0.35, 0.65, 7)  # the windows at these places are inside a section
            inside += [change(audio, int((at + place) * own)) for at in range(NUM_SECTIONS) for place in places]
            first, last = audio[:, :own], audio[:, -own:]
            levels = [measure_loudness(np.ascontiguousarray(part), RATE_HZ) for part in (first, last)]
            assert levels[0] is not None
            assert levels[1] == pytest.approx(levels[0], abs=3.0), prompt
            assert abs(centroid(last) - centroid(first)) <= 1 / 3, prompt
    largest, allowed = (np.percentile(changes, 95, axis=0) for changes in (seams, inside))
    print(f"changes of level (dB) and centroid (octaves): seams {largest}, inside {allowed}")
    assert np.all(largest <= allowed)


async def make(workshop: Workshop, prompt: str, *, seed: int) -> Audio:
    """Return the audio (C, S) of a piece of ten sections."""
    sections = (Section(OWN_S),) * NUM_SECTIONS
    request = GenerationRequest(prompt=prompt, duration_s=OWN_S * NUM_SECTIONS, seed=seed)
    spec = make_spec(model="demo", mode="long-piece", request=request, sections=sections, overlap_s=OWN_S)
    job = await workshop.queue.submit(spec)
    while not job.is_over:
        await asyncio.sleep(0.2)
        found = await workshop.queue.get(spec.ref)
        assert found is not None
        job = found
    assert job.result is not None, job.error
    data = b"".join([chunk async for chunk in workshop.queue.artifacts.read(job.result.file)])
    return np.asarray(soundfile.read(io.BytesIO(data), dtype="float32")[0].T)


def change(audio: Audio, at: int) -> tuple[float, float]:
    """Return how much level (dB) and centroid (octaves) differ between the windows before and after `at`."""
    window = int(WINDOW_S * RATE_HZ)
    before, after = audio[:, at - window : at], audio[:, at : at + window]
    return abs(level_db(after) - level_db(before)), abs(centroid(after) - centroid(before))


def level_db(audio: Audio) -> float:
    return float(10 * np.log10(np.square(audio, dtype=np.float64).mean() + 1e-12))


def centroid(audio: Audio) -> float:
    """Return the spectral centroid as the binary logarithm of hertz."""
    mono = audio.mean(axis=0)
    powers = np.abs(np.fft.rfft(mono)) ** 2
    return float(np.log2((powers * np.fft.rfftfreq(len(mono), 1 / RATE_HZ)).sum() / powers.sum()))
