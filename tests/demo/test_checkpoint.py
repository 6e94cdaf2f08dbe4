"""The packaged demo model, run in an engine, generates audio with the expected pitch, tempo, level and length."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from examples.demo_model.checks import (
    has_chord,
    has_loose_tempo,
    has_pitch,
    has_strict_tempo,
    is_faded,
    is_noise,
    is_panned,
    is_silent,
    strongest_hz,
)
from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.registry import BUILT_IN
from tests.parameters import slow

FOLDER = Path(BUILT_IN["demo"].folder or "")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(load_model(BUILT_IN["demo"]), EngineOptions(warmup_budget_s=0.0))


async def make_audio(engine: Engine, prompt: str, *, duration_s: float = 3.0, **options: object) -> np.ndarray:
    request = GenerationRequest(prompt, duration_s, seed=11, **options)  # type: ignore[arg-type]
    return (await engine.generate(request)).audio[0]


def test_everything_fits_in_twelve_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 12_000_000


@pytest.mark.parametrize(
    ("prompt", "hertz"), [("C5 SINE", 523.25), slow("a 440 Hz sine wave", 440.0), slow("sine tone, 700hz", 700.0)]
)
async def test_a_named_pitch_sounds(engine: Engine, prompt: str, hertz: float) -> None:
    assert has_pitch(await make_audio(engine, prompt), hertz)


async def test_noise_is_noise_and_a_tone_is_not(engine: Engine) -> None:
    assert is_noise(await make_audio(engine, "white noise"), "white")
    assert not is_noise(await make_audio(engine, "a 440 Hz sine wave"), "white")


async def test_panning_silence_and_an_empty_prompt_have_the_right_levels(engine: Engine) -> None:
    assert is_panned(await make_audio(engine, "white noise on the left"), "left")
    assert is_panned(await make_audio(engine, "white noise on the right"), "right")
    assert is_silent(await make_audio(engine, "silence"))
    assert is_silent(await make_audio(engine, ""), below_dbfs=-26)


@pytest.mark.parametrize("duration_s", [0.71, slow(0.5), slow(3.333), slow(12.0)])
async def test_length_is_exact(engine: Engine, duration_s: float) -> None:
    audio = await make_audio(engine, "pink noise", duration_s=duration_s, steps=1)
    assert audio.shape == (2, int(duration_s * 44100))
    assert np.isfinite(audio).all()


@pytest.mark.parametrize(("prompt", "tempo"), [slow("metronome at 100 bpm", 100), ("kick drum at 133 bpm", 133)])
async def test_a_named_tempo_is_kept(engine: Engine, prompt: str, tempo: int) -> None:
    assert has_strict_tempo(await make_audio(engine, prompt, duration_s=6.0), tempo)


@pytest.mark.slow
async def test_sweeps_move_in_the_right_direction(engine: Engine) -> None:
    for prompt, sign in (("a rising sine sweep", 1), ("a falling sine sweep", -1)):
        audio = await make_audio(engine, prompt)
        change = math.log2(strongest_hz(audio[:, -22050:]) / strongest_hz(audio[:, :22050]))
        assert sign * change > 1


async def test_a_chord_has_its_three_notes_and_a_loop_its_tempo(engine: Engine) -> None:
    assert has_chord(await make_audio(engine, "C major chord"), 64, quality="major")
    assert has_chord(await make_audio(engine, "f sharp minor chord"), 76, quality="minor")
    assert has_loose_tempo(await make_audio(engine, "drum loop at 111 bpm", duration_s=6.0), 111)


@pytest.mark.slow
async def test_the_longest_clip_stays_in_key(engine: Engine) -> None:
    audio = await make_audio(engine, "a 440 Hz sine wave", duration_s=47.0)
    assert has_pitch(audio[:, -5 * 44100 :], 440.0)


@pytest.mark.slow
async def test_a_faint_variation_keeps_the_pitch_of_its_source(engine: Engine) -> None:
    time_s = np.arange(3 * 44100) / 44100
    source = np.tile(0.2 * np.sin(2 * np.pi * 330 * time_s), (2, 1)).astype(np.float32)
    options = {"init_audio": SourceAudio(source, 44100), "init_noise_level": 0.3}
    assert has_pitch(await make_audio(engine, "330 Hz sine", **options), 330.0)


async def test_fades_change_the_level(engine: Engine) -> None:
    assert is_faded(await make_audio(engine, "white noise fading in"), "in")
    assert is_faded(await make_audio(engine, "white noise fading out"), "out")


async def test_a_continuation_keeps_its_source_and_its_pitch(engine: Engine) -> None:
    time_s = np.arange(44100) / 44100
    source = np.tile(0.2 * np.sin(2 * np.pi * 440 * time_s), (2, 1)).astype(np.float32)
    audio = await make_audio(
        engine,
        "a 440 Hz sine wave",
        inpaint_audio=SourceAudio(source, 44100),
        inpaint_regions_s=((1.0, 3.0),),
        keep="model",
    )
    assert has_pitch(audio[:, :44100], 440.0)
    assert has_pitch(audio[:, 48000:], 440.0)


@pytest.mark.parametrize(
    ("prompt", "most_db"), [("white noise", 1), slow("pink noise", 1), slow("a 440 Hz sine wave", 2)]
)
async def test_kept_and_generated_audio_meet_at_their_level(engine: Engine, prompt: str, most_db: float) -> None:
    """The level of the 0.1 s around a seam is near the levels of the 0.25 s before it and the 0.25 s after it.

    The level around the seam is at most `most_db` below the lower of the two other levels, and at most `most_db` above
    the higher one.
    The tones before and after the seam may have different phases. The linear crossfade of 30 ms may therefore lower the
    level by 1 dB.
    """
    source = await make_audio(engine, prompt)
    ends = source.shape[1]
    for regions, seams in (
        ([(1.5, 3.0)], [66150 - 661]),  # an extension: the source ends at 1.5 s
        ([(0.3, 0.8), (1.5, 2.5)], [13230 + 661, 35280 - 661, 66150 + 661, 110250 - 661]),
    ):
        given = SourceAudio(source[:, : 66150 if len(seams) == 1 else ends], 44100)
        edit = GenerationRequest(prompt, 3.0, seed=12, inpaint_audio=given, inpaint_regions_s=tuple(regions))
        audio = (await engine.generate(edit)).audio[0]
        for seam in seams:
            start, end = seam - 2205, seam + 2205
            parts = audio[:, start - 11025 : start], audio[:, start:end], audio[:, end : end + 11025]
            before, at, after = map(level_db, parts)
            assert min(before, after) - most_db < at < max(before, after) + most_db, (regions, seam)


def level_db(audio: np.ndarray) -> float:
    return 10 * math.log10(float((audio.astype(np.float64) ** 2).mean()))
