from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stable_audio_serve.audio.stretch import time_stretch
from tests.parameters import some

RATE_HZ = 44100
SPEEDS = (0.25, 0.4, 0.5, 0.8, 1.0, 1.1, 2.0, 3.0, 4.0)


TONES = ((0.25, 440.0), (0.8, 55.0), (1.0, 440.0), (1.1, 3000.0), (4.0, 440.0))


def make_sine(frequency_hz: float, *, duration_s: float = 1.5, rate_hz: int = RATE_HZ) -> npt.NDArray[np.float32]:
    t = np.arange(int(duration_s * rate_hz)) / rate_hz
    tone = 0.5 * np.sin(2 * np.pi * frequency_hz * t)
    return np.stack([tone, -0.5 * tone]).astype(np.float32)


def measure_pitch(tone: npt.NDArray[np.float32], rate_hz: int = RATE_HZ) -> float:
    size = 2**18
    tone = tone[:size]
    return float(np.abs(np.fft.rfft(tone * np.hanning(len(tone)), size)).argmax()) * rate_hz / size


@pytest.mark.parametrize(("speed", "frequency_hz"), some(itertools.product(SPEEDS, (55.0, 440.0, 3000.0)), TONES))
def test_pitch_level_and_length_are_kept(speed: float, frequency_hz: float) -> None:
    audio = make_sine(frequency_hz)
    stretched = time_stretch(audio, RATE_HZ, speed=speed)
    assert stretched.dtype == np.float32
    assert stretched.shape == (2, round(audio.shape[1] / speed))
    assert measure_pitch(stretched[0]) == pytest.approx(frequency_hz, rel=0.005)
    inner = stretched[0, 2000:-2000]
    assert inner.std() == pytest.approx(audio[0].std(), rel=0.1)


@pytest.mark.parametrize("speed", some(SPEEDS, (0.25, 1.1, 4.0)))
def test_attacks_keep_their_place(speed: float) -> None:
    positions = [0, 30_000, 66_150]
    audio = np.zeros((2, 2 * RATE_HZ), np.float32)
    audio[:, positions] = 1.0
    envelope = np.abs(time_stretch(audio, RATE_HZ, speed=speed)[0])
    for position in positions:
        expected = position / speed
        start = max(0, int(expected) - 2000)
        found = start + envelope[start : int(expected) + 2000].argmax()
        assert abs(found - expected) / RATE_HZ < 0.002, f"the click at {position}"


@pytest.mark.parametrize("speed", [0.25, 1.25])
def test_the_stereo_image_is_kept(speed: float) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, RATE_HZ).astype(np.float32)
    left, right = time_stretch(np.stack([noise, -0.5 * noise]), RATE_HZ, speed=speed)
    np.testing.assert_allclose(right, -0.5 * left, atol=0.005)


def test_the_same_input_gives_the_same_samples() -> None:
    audio = np.random.default_rng(1).normal(0, 0.1, (2, RATE_HZ // 2)).astype(np.float32)
    np.testing.assert_array_equal(
        time_stretch(audio, RATE_HZ, speed=0.3), time_stretch(audio.copy(), RATE_HZ, speed=0.3)
    )


@pytest.mark.parametrize("rate_hz", [8000, 96000])
def test_stretching_works_at_other_rates(rate_hz: int) -> None:
    stretched = time_stretch(make_sine(440, rate_hz=rate_hz), rate_hz, speed=1.3)
    assert measure_pitch(stretched[0], rate_hz) == pytest.approx(440, rel=0.005)


@given(st.integers(0, 3000), st.integers(1, 2), st.floats(0.25, 4.0))
def test_any_length_is_exact_and_finite(samples: int, channels: int, speed: float) -> None:
    audio = np.random.default_rng(samples).uniform(-1, 1, (channels, samples)).astype(np.float32)
    stretched = time_stretch(audio, RATE_HZ, speed=speed)
    assert stretched.shape == (channels, max(round(samples / speed), min(samples, 1)))
    assert np.isfinite(stretched).all()
