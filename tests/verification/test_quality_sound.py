"""Descriptions of sines and noise have known levels and spectra. Clips that differ too much do not count as equal."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from stable_audio_serve.verification.quality.sound import (
    cosine,
    describe,
    difference_from_other,
    difference_from_same,
)

RATE = 44_100
RNG = np.random.default_rng(3)
NOISE = RNG.standard_normal((2, RATE)).astype(np.float32) * np.float32(0.1)


def sine(hertz: float, *, amplitude: float = 0.5, rate: int = RATE) -> npt.NDArray[np.float32]:
    wave = amplitude * np.sin(2 * np.pi * hertz * np.arange(rate) / rate)
    return np.stack([wave, wave]).astype(np.float32)


def test_the_level_of_a_sine_matches_theory() -> None:
    assert describe(sine(1000.0, amplitude=1.0), RATE).level_db == pytest.approx(-3.01, abs=0.01)
    assert describe(sine(1000.0, amplitude=0.5), RATE).level_db == pytest.approx(-9.03, abs=0.01)


@pytest.mark.parametrize("rate", [1000, 8000, 44_100, 96_000])
def test_equal_clips_are_equal_at_any_rate(rate: int) -> None:
    clip = describe(sine(100.0, rate=rate), rate)
    assert cosine(clip, clip) == pytest.approx(1.0, abs=1e-12)
    assert difference_from_same(clip, clip) is None


@pytest.mark.parametrize(
    ("factor", "same", "other"),
    [
        (1.0, True, True),
        (1.0115, True, True),
        (1.0117, False, True),
        (1.99, False, True),
        (2.0, False, False),
        (0.5, False, False),
    ],
)
def test_level_bounds_are_a_tenth_of_a_decibel_or_six_for_other_weights(factor: float, same: bool, other: bool) -> None:
    """A factor of 1.01158 is 0.1 dB, a factor of 1.9953 is 6 dB."""
    before, now = describe(NOISE, RATE), describe(NOISE * np.float32(factor), RATE)
    assert (difference_from_same(now, before) is None) is same
    assert (difference_from_other(now, before) is None) is other


def test_half_precision_rounding_and_16_bit_dither_are_accepted() -> None:
    before = describe(NOISE, RATE)
    dithered = NOISE + RNG.uniform(-1 / 32768, 1 / 32768, NOISE.shape).astype(np.float32)
    for audio in (NOISE.astype(np.float16).astype(np.float32), dithered):
        assert difference_from_same(describe(audio, RATE), before) is None


def test_another_pitch_other_noise_and_swapped_channels_fail() -> None:
    fault = difference_from_same(describe(sine(2000.0), RATE), describe(sine(1000.0), RATE))
    assert fault is not None
    assert "spectral cosine" in fault
    other = RNG.standard_normal(NOISE.shape).astype(np.float32) * np.float32(0.1)
    assert difference_from_same(describe(other, RATE), describe(NOISE, RATE)) is not None
    tone_left = np.stack([sine(500.0)[0], NOISE[0]])
    assert difference_from_same(describe(tone_left[::-1], RATE), describe(tone_left, RATE)) is not None


def test_noise_at_minus_30_db_passes_and_at_minus_20_db_fails() -> None:
    """If noise with s times the power of a sine is added to the sine, the cosine is about 1 / sqrt(1 + s)."""
    tone = sine(1000.0, amplitude=0.5 * math.sqrt(2))
    for share_db, passes in ((-30.0, True), (-20.0, False)):
        disturbed = tone + NOISE * np.float32(0.5 / 0.1 * 10 ** (share_db / 20))
        assert (difference_from_same(describe(disturbed, RATE), describe(tone, RATE)) is None) is passes


@pytest.mark.parametrize("value", [0.0, 0.7, -3.0])
def test_a_constant_signal_is_silent(value: float) -> None:
    assert describe(np.full((2, RATE), value, np.float32), RATE).is_silent
    assert not describe(NOISE + np.float32(value), RATE).is_silent


def test_clips_of_different_lengths_differ() -> None:
    assert "samples" in (difference_from_same(describe(NOISE[:, :-1], RATE), describe(NOISE, RATE)) or "")


def test_a_clip_shorter_than_a_window_has_a_spectrum() -> None:
    clip = describe(NOISE[:, :100], RATE)
    assert cosine(clip, clip) == pytest.approx(1.0)
