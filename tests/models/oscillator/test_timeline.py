from __future__ import annotations

import re

import pytest
import torch

from examples.demo_model.vocabulary import TEMPO_PATTERN
from stable_audio_serve.models.oscillator.timeline import NUM_TIMELINE_FEATURES, TempoRule, timeline_features

RULE = TempoRule(re.compile(TEMPO_PATTERN), default_bpm=120, minimum_bpm=30, maximum_bpm=300)
FRAME_S = 4096 / 44100


@pytest.mark.parametrize(
    ("prompt", "tempo"),
    [
        ("metronome at 97 bpm", 97),
        ("DRUM LOOP, 128BPM!", 128),
        ("a beat at 60 beats per minute", 60),
        ("tempo 143 please", 143),
        ("bpm: 77", 77),
        ("tempo=88, kick", 88),
        ("１２５ ＢＰＭ house", 125),
        ("92.5 bpm", 92.5),
        ("100-bpm clicks", 100),
        ("a 440 Hz sine over drums at 90 bpm", 90),
        ("drum loop", 120),
        ("", 120),
        ("808 kick in 4/4", 120),
        ("999 bpm", 300),
        ("techno kick 140", 140),
        ("drums at 99.5, loud", 99.5),
        ("128 house beat", 128),
        ("hi-hats @ 160", 160),
        ("kick drum 60 Hz", 120),
        ("drum loop, 60 seconds", 120),
        ("loop of 64 bars, 90s", 120),
        ("drums -60 dB", 120),
        ("drum machine 808, 2024", 120),
    ],
)
def test_tempo_is_read_from_the_usual_spellings(prompt: str, tempo: float) -> None:
    assert RULE.read(prompt) == tempo


def test_many_spaces_are_read_as_one() -> None:
    spaces = " " * 100_000  # with a quadratic search, this takes over a minute
    assert RULE.read(f"tempo{spaces}x{spaces}97{spaces}bpm") == 97


def test_every_whole_tempo_is_read() -> None:
    assert [RULE.read(f"kick {tempo}bpm") for tempo in range(60, 181)] == list(range(60, 181))


def test_features_repeat_every_bar_and_do_not_depend_on_headroom() -> None:
    tempo = 60 / FRAME_S / 8  # at this tempo, a beat is 8 latent frames long
    features = timeline_features(80, frame_s=FRAME_S, seconds_total=6.0, tempo_bpm=tempo)
    assert features.shape == (NUM_TIMELINE_FEATURES, 80)
    beat = features[-17:-1]
    torch.testing.assert_close(beat[:, :32], beat[:, 32:64], atol=1e-4, rtol=0)
    shorter = timeline_features(60, frame_s=FRAME_S, seconds_total=6.0, tempo_bpm=tempo)
    assert torch.equal(features[:, :60], shorter)


def test_features_stay_bounded_at_the_ends_of_the_range() -> None:
    for seconds, tempo in ((0.01, 300.0), (48.0, 30.0)):
        features = timeline_features(520, frame_s=FRAME_S, seconds_total=seconds, tempo_bpm=tempo)
        assert features.isfinite().all()
        assert features.abs().max() < 6
