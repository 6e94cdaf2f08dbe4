"""Loudness of the test signals of EBU Tech 3341, and of random audio compared with pyloudnorm."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from stable_audio_serve.audio.loudness import describe_clip, measure_loudness
from tests.parameters import some


def make_tones(rate_hz: int, *parts: tuple[float, float]) -> npt.NDArray[np.float32]:
    """Returns a stereo sine of 1 kHz that consists of these parts in sequence: (peak level in dBFS, seconds)."""
    levels = np.concatenate([np.full(round(seconds * rate_hz), 10 ** (level / 20)) for level, seconds in parts])
    tone = np.sin(2 * np.pi * 1000 * np.arange(len(levels)) / rate_hz)
    return np.tile(levels * tone, (2, 1)).astype(np.float32)


@pytest.mark.parametrize("rate_hz", some((44_100, 48_000), (48_000,)))
@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([(-23, 20)], -23.0),
        ([(-33, 20)], -33.0),
        ([(-36, 10), (-23, 60), (-36, 10)], -23.0),
        ([(-72, 10), (-36, 10), (-23, 60), (-36, 10), (-72, 10)], -23.0),
    ],
)
def test_loudness_of_the_compliance_signals(rate_hz: int, parts: list[tuple[float, float]], expected: float) -> None:
    assert measure_loudness(make_tones(rate_hz, *parts), rate_hz) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(
    ("rate_hz", "seconds", "channels"),
    some(
        itertools.product((8000, 22_050, 44_100, 48_000, 96_000), (0.4, 0.44, 0.46, 1.0, 3.33), (1, 2)),
        ((8000, 3.33, 1), (44_100, 0.4, 2), (44_100, 0.44, 2), (44_100, 0.46, 1), (96_000, 1.0, 2)),
    ),
)
def test_loudness_matches_pyloudnorm(rate_hz: int, seconds: float, channels: int) -> None:
    import pyloudnorm  # imported here, because its scipy loads slowly in each process that collects this test

    rng = np.random.default_rng(0)
    meter = pyloudnorm.Meter(rate_hz, filter_class="DeMan")
    noise = rng.uniform(-1, 1, (channels, round(seconds * rate_hz)))
    t = np.arange(noise.shape[1]) / rate_hz
    for audio in (
        noise,
        noise * 10 ** (-60 / 20),
        noise * np.exp(-3 * t),
        noise * (t % 0.6 < 0.35),
        noise * 1e-3 + 0.9,
        noise * 1e-3 + np.sin(2 * np.pi * 25 * t),
    ):
        expected = meter.integrated_loudness(audio.T)
        assert measure_loudness(audio.astype(np.float32), rate_hz) == pytest.approx(expected, abs=0.005)


def test_loudness_needs_400_ms() -> None:
    assert measure_loudness(make_tones(44_100, (-20, 1))[:, :17_639], 44_100) is None
    assert measure_loudness(make_tones(44_100, (-20, 1))[:, :17_640], 44_100) == pytest.approx(-20, abs=0.2)


@pytest.mark.parametrize(
    ("level", "is_silent", "has_loudness"), [(-10, False, True), (-69, False, True), (-71, True, False)]
)
def test_silence_is_below_70_dbfs(level: float, is_silent: bool, has_loudness: bool) -> None:
    facts = describe_clip(make_tones(44_100, (level, 1)), 44_100, seed=5)
    assert facts.seed == 5
    assert facts.peak == pytest.approx(10 ** (level / 20), rel=1e-3)
    assert (facts.is_silent, facts.loudness_lufs is not None) == (is_silent, has_loudness)


def test_loudness_is_undefined_at_very_low_rates() -> None:
    noise = np.random.default_rng(0).uniform(-1, 1, (2, 10_000)).astype(np.float32)
    assert describe_clip(noise, 1000, seed=0).loudness_lufs is None


def test_empty_and_zero_audio_is_silent() -> None:
    for num_samples in (0, 100, 44_100):
        facts = describe_clip(np.zeros((2, num_samples), np.float32), 44_100, seed=0)
        assert (facts.peak, facts.loudness_lufs, facts.is_silent) == (0.0, None, True)


@pytest.mark.parametrize("sample", [np.nan, np.inf])
def test_non_finite_samples_do_not_count(sample: float) -> None:
    audio = make_tones(44_100, (-23, 20))
    audio[0, 44_100] = sample
    assert measure_loudness(audio, 44_100) == pytest.approx(-23, abs=0.1)


def test_samples_too_large_to_square_have_no_loudness() -> None:
    assert measure_loudness(make_tones(44_100, (500, 1)), 44_100) is None
