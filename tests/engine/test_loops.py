"""Clips of the demo model that repeat without a seam: the sample jump and the spectral flux where they repeat."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from stable_audio_serve.audio.finish import finish_clip
from stable_audio_serve.audio.loops import Loop
from stable_audio_serve.audio.peaks import CEILING
from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, LoopStart
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.registry import resolve_entry
from tests.parameters import some

RATE_HZ = 44_100
_FRAME, _HOP = 1024, 256
PROMPTS = (
    *("a 440 Hz sine tone", "house drums 120 bpm", "white noise", "rain", "a kick drum", "saw chord pad"),
    *("bell", "bass c2", "hi hat pattern 140 bpm", "square tone, fade out", "ocean", "organ a4", "wind, fade in"),
    *("snare loop 100 bpm", "piano arpeggio 120 bpm", "siren", "laser", "metronome 90 bpm", "flute c5", "pluck loop"),
)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(load_model(resolve_entry("demo")), EngineOptions(warmup_budget_s=0.0))
    yield engine
    asyncio.run(engine.close())


def make_loop(
    engine: Engine, prompt: str, *, duration_s: float, seed: int = 1, loop: LoopStart = "free", steps: int = 20
) -> GenerationResult:
    request = GenerationRequest(prompt=prompt, duration_s=duration_s, seed=seed, steps=steps, loop=loop)
    return asyncio.run(engine.generate(request))


def largest_jumps(audio: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Returns the largest difference of two adjacent samples: where the clip repeats, and elsewhere."""
    steps = np.abs(np.diff(audio, axis=1, append=audio[:, :1])).max(axis=0)
    return float(steps[-1]), float(steps[:-1].max())


def largest_fluxes(audio: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Returns the largest rise of the spectrum from one frame to the next: where the clip repeats, and elsewhere."""
    middle = audio.shape[1]
    twice = np.tile(audio.mean(axis=0), 2)[middle % _HOP :]
    seam = middle - middle % _HOP
    frames = np.lib.stride_tricks.sliding_window_view(twice, _FRAME)[::_HOP] * np.hanning(_FRAME)
    flux = np.maximum(np.diff(np.abs(np.fft.rfft(frames)), axis=0), 0).sum(axis=1)
    starts = np.arange(len(flux)) * _HOP
    is_at_seam = (starts > seam - _FRAME - _HOP) & (starts < seam)
    return float(flux[is_at_seam].max()), float(flux[~is_at_seam].max())


@pytest.mark.parametrize("index", some(range(20), (0, 1, 9)))
def test_a_loop_has_no_seam(engine: Engine, index: int) -> None:
    result = make_loop(engine, PROMPTS[index], duration_s=1.5 + index / 17, seed=index)
    (audio,) = result.audio
    assert result.loop_s == 1.5 + index / 17
    assert audio.shape[1] == int((1.5 + index / 17) * RATE_HZ)
    for at_seam, elsewhere in (largest_jumps(audio), largest_fluxes(audio)):
        assert at_seam <= elsewhere


def test_a_limited_loop_has_no_seam(engine: Engine) -> None:
    (audio,) = make_loop(engine, "house drums 120 bpm", duration_s=1.7).audio
    for gain in (1.0, 40.0):
        finished, _ = finish_clip(gain * audio, RATE_HZ, seed=0, peaks="limit", is_loop=True)
        assert finished.shape == audio.shape
        assert np.abs(finished).max() <= CEILING
        for at_seam, elsewhere in (largest_jumps(finished), largest_fluxes(finished)):
            assert at_seam <= elsewhere


def test_a_loop_keeps_the_attack_at_its_start(engine: Engine) -> None:
    request = GenerationRequest(prompt="a kick drum", duration_s=2.5, seed=3, steps=20)
    (clip,) = asyncio.run(engine.generate(request)).audio
    loops: dict[LoopStart, float] = {"free": 0.05, "bars": 0.0}
    for loop, starts_s in loops.items():
        (audio,) = make_loop(engine, "a kick drum", duration_s=1.5, seed=3, loop=loop).audio
        start = round(starts_s * RATE_HZ)
        assert np.abs(audio).max() == pytest.approx(np.abs(clip).max(), rel=0.02)
        assert np.abs(audio[0]).argmax() == pytest.approx(start + np.abs(clip[0]).argmax(), abs=1)


@pytest.mark.parametrize(("tempo_bpm", "bars"), some([(130, 1), (70, 1), (97, 2), (140, 2)], [(97, 2)]))
def test_bars_are_exact_to_the_sample(engine: Engine, tempo_bpm: int, bars: int) -> None:
    loop = Loop(tempo_bpm, bars)
    (audio,) = make_loop(engine, "a click", duration_s=loop.duration_s, loop="bars").audio
    assert audio.shape[1] == loop.num_samples(RATE_HZ)


def test_a_loop_as_long_as_the_model_allows_is_closed_or_refused(engine: Engine) -> None:
    longest_s = engine.spec.card.max_duration_s
    (audio,) = make_loop(engine, "organ a4", duration_s=longest_s - 0.05, steps=4).audio
    assert largest_jumps(audio)[0] <= largest_jumps(audio)[1]
    with pytest.raises(InvalidRequestError, match="duration must be at most") as caught:
        make_loop(engine, "organ a4", duration_s=longest_s)
    assert caught.value.field == "duration"
