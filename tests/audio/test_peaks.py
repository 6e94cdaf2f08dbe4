"""Peaks of loud clips: how much the limiter distorts sines, and the results of clipping and scaling."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from stable_audio_serve.audio.keep import keep_source, plan_spans
from stable_audio_serve.audio.peaks import limit, treat_peaks
from stable_audio_serve.core.generation import GeneratedSpan

CEILING = 0.977
RATE_HZ = 44_100

Audio = npt.NDArray[np.float32]
Generated = tuple[GeneratedSpan, ...]


def make_sine(hertz: float, *, level: float, duration_s: float = 2.0) -> Audio:
    t = np.arange(int(duration_s * RATE_HZ)) / RATE_HZ
    return np.tile(level * np.sin(2 * np.pi * hertz * t), (2, 1)).astype(np.float32)


def distortion_db(audio: Audio) -> float:
    """Returns the power of everything except the strongest tone, relative to that tone, in decibels."""
    windowed = audio.astype(np.float64) * np.hanning(len(audio))
    power = np.abs(np.fft.rfft(windowed)) ** 2
    strongest = int(power.argmax())
    tone = power[max(0, strongest - 4) : strongest + 5].sum()
    return float(10 * np.log10((power.sum() - tone) / tone))


@given(
    arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(0, 400)), elements=st.floats(-50, 50, width=32)),
    st.sampled_from([800, 16_000, 44_100, 48_000]),
)
def test_limited_audio_stays_below_the_ceiling_and_gains_nothing(audio: Audio, rate_hz: int) -> None:
    before = audio.copy()
    limited = limit(audio, rate_hz)
    np.testing.assert_array_equal(audio, before)
    assert limited.shape == audio.shape
    assert limited.dtype == np.float32
    assert float(np.abs(limited).max(initial=0.0)) <= CEILING
    assert (np.abs(limited) <= np.abs(audio)).all()
    assert (limited * audio >= 0).all()


@pytest.mark.parametrize("level", [0.1, 0.976, CEILING])
def test_a_clip_below_the_ceiling_is_unchanged(level: float) -> None:
    audio = make_sine(440, level=1.0)
    audio *= np.float32(level) / np.abs(audio).max()
    np.testing.assert_array_equal(limit(audio, RATE_HZ), audio)


@pytest.mark.parametrize("hertz", [40, 100, 440, 1000, 5000])
def test_a_steady_tone_stays_a_pure_tone(hertz: float) -> None:
    """Limiting a tone that peaks 3 dB over full scale hardly distorts it. Clipping would cause about -20 dB."""
    audio = make_sine(hertz, level=10 ** (3 / 20))
    middle = limit(audio, RATE_HZ)[0, RATE_HZ // 2 : -RATE_HZ // 2]
    assert distortion_db(np.clip(audio[0], -1, 1)) > -30
    assert distortion_db(middle) < -80
    assert middle.max() > CEILING - 0.001


def test_the_gain_is_smooth_and_recovers() -> None:
    """At a single peak in a quiet tone, the limiter's gain falls within 5 ms and then recovers slowly."""
    audio = make_sine(997, level=0.4)
    audio[0, RATE_HZ // 2] = 3.0
    with np.errstate(invalid="ignore"):
        gain = limit(audio, RATE_HZ)[1].astype(np.float64) / audio[1]
    gain = gain[np.abs(audio[1]) > 0.2]  # the gain cannot be measured where the tone is near zero
    assert gain.min() == pytest.approx(CEILING / 3, abs=0.01)
    assert np.abs(np.diff(gain)).max() < 0.1  # no sudden change between two samples
    np.testing.assert_array_equal(limit(audio, RATE_HZ)[:, : RATE_HZ // 2 - 300], audio[:, : RATE_HZ // 2 - 300])
    np.testing.assert_array_equal(limit(audio, RATE_HZ)[:, -RATE_HZ // 4 :], audio[:, -RATE_HZ // 4 :])


def test_both_channels_share_one_gain() -> None:
    audio = make_sine(300, level=2.0)
    audio[1] *= 0.25
    limited = limit(audio, RATE_HZ)
    np.testing.assert_allclose(limited[1], limited[0] * 0.25, atol=1e-6)


def test_samples_far_from_a_peak_are_unchanged() -> None:
    loud = np.random.default_rng(3).normal(0, 0.5, (2, RATE_HZ)).astype(np.float32)
    far = np.concatenate([loud, np.zeros((2, 4 * RATE_HZ), np.float32), loud], axis=1)
    np.testing.assert_array_equal(limit(far, RATE_HZ)[:, :RATE_HZ], limit(loud, RATE_HZ))


def test_scale_and_clip_match_the_references() -> None:
    audio = make_sine(440, level=1.5)
    np.testing.assert_array_equal(treat_peaks(audio, RATE_HZ, peaks="clip"), np.clip(audio, -1, 1))
    for level in (0.1, 1.5):
        scaled = treat_peaks(make_sine(440, level=level), RATE_HZ, peaks="scale")
        assert np.abs(scaled).max() == 1.0
        np.testing.assert_allclose(scaled, make_sine(440, level=1.0), atol=1e-3)
    silence = np.zeros((2, 100), np.float32)
    np.testing.assert_array_equal(treat_peaks(silence, RATE_HZ, peaks="scale"), silence)


def make_edit(model: Audio, source: Audio, *, regions_s: list[tuple[float, float]]) -> tuple[Audio, Generated]:
    spans = plan_spans(regions_s, num_source=source.shape[1], num_samples=model.shape[1], sample_rate_hz=RATE_HZ)
    audio = model.copy()
    return audio, keep_source(audio, source, spans=spans)


def test_limiting_a_loud_region_changes_no_source_sample() -> None:
    source = make_sine(440, level=0.99)
    audio, generated = make_edit(make_sine(220, level=1.7), source, regions_s=[(0.5, 1.0), (1.2, 1.3)])
    finished = treat_peaks(audio, RATE_HZ, peaks="limit", generated=generated)
    inside = np.zeros(source.shape[1], dtype=bool)
    for start, end in ((22050, 44100), (52920, 57330)):
        inside[start:end] = True
        np.testing.assert_array_less(np.abs(finished[:, start + 1323 : end - 1323]), CEILING + 1e-6)
    np.testing.assert_array_equal(finished[:, ~inside], source[:, ~inside])
    assert np.abs(finished[:, inside]).max() < 0.99
    middle = finished[0, 24000:42000].astype(np.float64)
    assert distortion_db(middle) < -45


def test_a_source_above_full_scale_is_clipped_not_limited() -> None:
    source, model = make_sine(440, level=1.5), make_sine(220, level=0.5)
    audio, generated = make_edit(model, source, regions_s=[(0.5, 1.0)])
    finished = treat_peaks(audio, RATE_HZ, peaks="limit", generated=generated)
    np.testing.assert_array_equal(finished[:, :22050], source[:, :22050].clip(-1, 1))
    np.testing.assert_array_equal(finished[:, 23373:42777], model[:, 23373:42777])
    scaled = treat_peaks(audio, RATE_HZ, peaks="scale", generated=generated)
    np.testing.assert_allclose(scaled * np.abs(audio).max(), audio, atol=1e-6)


@given(st.floats(0.1, 3), st.floats(0.1, 1), st.lists(st.integers(0, 400), min_size=2, max_size=6, unique=True))
def test_limited_audio_is_no_louder_than_the_source_or_the_ceiling(
    level: float, source_level: float, edges: list[int]
) -> None:
    edges = sorted(edges)[: len(edges) // 2 * 2]
    regions_s = [(start / 8000, end / 8000) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    random = np.random.default_rng(len(edges))
    model, source = ((scale * random.uniform(-1, 1, (2, 400))).astype(np.float32) for scale in (level, source_level))
    spans = plan_spans(regions_s, num_source=400, num_samples=400, sample_rate_hz=8000)
    audio = model.copy()
    finished = treat_peaks(audio, 8000, peaks="limit", generated=keep_source(audio, source, spans=spans))
    assert np.abs(finished).max() <= max(CEILING, np.abs(source).max()) + 1e-6
