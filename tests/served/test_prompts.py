"""The demo model follows prompts written by hand, which are unlike the generated prompts of its training data."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from examples.demo_model.checks import (
    has_chord,
    has_loose_tempo,
    has_strict_tempo,
    is_faded,
    is_noise,
    is_panned,
    strongest_hz,
)
from examples.demo_model.players import HttpPlayer
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.models.registry import BUILT_IN
from tests.patience import PATIENCE_S
from tests.serving.launched import LaunchedServer

pytestmark = pytest.mark.server

Check = Callable[[np.ndarray], bool]
C4 = 64  # pitch in quarter tones, as in the check of chords, where A4 (440 Hz) is 82


@pytest.fixture
def url(server: LaunchedServer) -> str:
    return server.url


def pitch(hertz: float) -> Check:
    return lambda audio: abs(1200 * math.log2(max(strongest_hz(audio), 1) / hertz)) < 50


def beat(tempo_bpm: float) -> Check:
    return lambda audio: has_strict_tempo(audio, tempo_bpm)


def loop(tempo_bpm: float) -> Check:
    return lambda audio: has_loose_tempo(audio, tempo_bpm)


def sweep(sign: int) -> Check:
    return lambda audio: sign * math.log2(strongest_hz(audio[:, -11025:]) / strongest_hz(audio[:, :11025])) > 0.5


# Prompts written by hand, by kind: prompt, a check of its audio, and duration in seconds.
SPOKEN: dict[str, list[tuple[str, Check, float]]] = {
    "pitch": [
        ("Sine wave, 291 Hz", pitch(291), 0.7),
        ("a pure sine tone at exactly 1234hz please!", pitch(1234), 3.0),
        ("SQUARE WAVE @ 110HZ", pitch(110), 4.0),
        ("give me a sawtooth at the note F#3, no effects", pitch(185.0), 2.5),
        ("triangle wave note B5", pitch(987.77), 1.1),
        ("square tone playing A flat 4", pitch(415.3), 5.0),
        ("1.8 kHz sine", pitch(1800), 2.0),
        ("sine — D♯5 — steady", pitch(622.25), 10.0),
        ("triangle 95 hertz", pitch(95), 3.3),
        ("saw wave C3", pitch(130.81), 6.0),
    ],
    "tempo": [
        ("metronome clicking at 73bpm", beat(73), 8.0),
        ("Metronome clicks, 168 BPM", beat(168), 5.0),
        ("four on the floor kick pattern 124 bpm", beat(124), 6.0),
        ("a steady kick drum at 90 beats per minute", beat(90), 9.0),
        ("kick pattern, tempo 141 bpm", beat(141), 5.5),
        ("energetic rock drum loop, 97 bpm", loop(97), 10.0),
        ("drum loop at 160BPM", loop(160), 7.0),
        ("funky drum beat (118 bpm)", loop(118), 8.0),
    ],
    "other": [
        ("steady white noise", lambda audio: is_noise(audio, "white"), 2.0),
        ("rising sine sweep", sweep(1), 4.0),
        ("a tone that sweeps down, falling", sweep(-1), 3.0),
        ("440 Hz sine panned hard left", lambda audio: is_panned(audio, "left"), 2.0),
        ("white noise only on the right", lambda audio: is_panned(audio, "right"), 1.5),
        ("a 300 Hz sine wave that fades in slowly", lambda audio: is_faded(audio, "in"), 5.0),
        ("C5 square wave fading out", lambda audio: is_faded(audio, "out"), 4.0),
        ("C major chord", lambda audio: has_chord(audio, C4, quality="major"), 3.0),
        ("a minor chord of A", lambda audio: has_chord(audio, C4 + 18, quality="minor"), 3.0),
    ],
}


@pytest.mark.parametrize("group", SPOKEN)
async def test_handwritten_prompts_are_followed(url: str, group: str) -> None:
    wrong = []
    async with HttpPlayer(url) as player:
        for number, (prompt, check, duration_s) in enumerate(SPOKEN[group]):
            audio = await player.play(GenerationRequest(prompt, duration_s, 100 + number, steps=8))
            assert audio.shape == (2, int(duration_s * 44100))
            if not check(audio):
                wrong.append(prompt)
    assert len(wrong) <= 0.15 * len(SPOKEN[group]), wrong


def test_health_and_models_report_a_demo(url: str) -> None:
    import httpx

    with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        assert client.get("/health").json()["models"]["demo"]["demo"] is True
        (model,) = (entry for entry in client.get("/v1/models").json()["data"] if entry["id"] == "demo")
    assert model["is_demo"] is True
    assert "demo" in model["description"].lower()


def test_model_card_lists_its_limits() -> None:
    card = Path(BUILT_IN["demo"].folder or "") / "README.md"
    assert "## What it cannot do" in card.read_text()
