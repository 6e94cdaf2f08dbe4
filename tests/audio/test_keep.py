"""Edits of a source file: the result equals the source outside the regenerated regions and cross-fades inside them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stable_audio_serve.audio.keep import Span, fade_ramp, keep_source, plan_spans

RATE_HZ, FADE = 1000, 30

Regions = list[tuple[float, float]]


def plan(*regions_s: tuple[float, float], source: int = 3000, samples: int = 3000) -> tuple[Span, ...]:
    return plan_spans(regions_s, num_source=source, num_samples=samples, sample_rate_hz=RATE_HZ)


@pytest.mark.parametrize(
    ("regions_s", "spans"),
    [
        ([(1.0, 2.0)], [Span(1000, 2000, FADE, FADE)]),
        ([(0.0, 2.0)], [Span(0, 2000, 0, FADE)]),
        ([(1.0, 3.0)], [Span(1000, 3000, FADE, 0)]),
        ([(0.0, 3.0)], [Span(0, 3000)]),
        ([(2.0, 2.5), (1.0, 1.2)], [Span(1000, 1200, FADE, FADE), Span(2000, 2500, FADE, FADE)]),
        ([(1.0, 1.5), (1.5, 2.0), (1.2, 1.3)], [Span(1000, 2000, FADE, FADE)]),
        ([(1.0, 1.04)], [Span(1000, 1040, 20, 20)]),
        ([(1.0, 1.0015)], [Span(1000, 1001)]),
        ([(0.0, 0.02)], [Span(0, 20, 0, 20)]),
        ([(2.98, 3.0)], [Span(2980, 3000, 20, 0)]),
    ],
)
def test_fades_are_inside_regions_and_meet_in_short_ones(regions_s: Regions, spans: list[Span]) -> None:
    assert plan(*regions_s) == tuple(spans)


def test_times_are_whole_samples_where_floats_are_slightly_less() -> None:
    (span,) = plan_spans([(0.7, 1.4)], num_source=88_200, num_samples=88_200, sample_rate_hz=44_100)
    assert (span.start, span.stop) == (30_870, 61_740)


@pytest.mark.parametrize(
    ("regions_s", "spans"),
    [
        ([(3.0, 5.0)], [Span(2970, 5000, FADE)]),
        ([(3.002, 5.0)], [Span(2970, 5000, FADE)]),  # the source ends at 3 s, slightly before the region
        ([(2.99, 5.0)], [Span(2970, 5000, FADE)]),
        ([(2.97, 5.0)], [Span(2970, 5000, FADE)]),
        ([(2.9, 5.0)], [Span(2900, 5000, FADE)]),
        ([(2.5, 2.99), (3.0, 5.0)], [Span(2500, 2990, FADE, FADE), Span(2990, 5000, 10)]),
        ([(3.0, 4.0)], [Span(2970, 5000, FADE)]),
        ([(0.0, 5.0)], [Span(0, 5000)]),
    ],
)
def test_a_continuation_fades_within_its_source(regions_s: Regions, spans: list[Span]) -> None:
    assert plan(*regions_s, samples=5000) == tuple(spans)


@pytest.mark.parametrize(
    ("regions_s", "spans"),
    [
        ([], [Span(0, 1030, 0, FADE)]),
        ([(0.0, 1.0)], [Span(0, 1030, 0, FADE)]),
        ([(0.0, 1.0), (4.0, 5.0)], [Span(0, 1030, 0, FADE), Span(3970, 5000, FADE)]),
        ([(0.0, 1.0), (1.01, 2.0)], [Span(0, 1010, 0, 10), Span(1010, 2000, FADE, FADE)]),
        ([(0.0, 1.0), (1.0, 2.0)], [Span(0, 2000, 0, FADE)]),
        ([(0.0, 1.0), (2.0, 4.0), (4.0, 5.0)], [Span(0, 1030, 0, FADE), Span(2000, 5000, FADE)]),
        ([(0.0, 5.0)], [Span(0, 5000)]),
    ],
)
def test_audio_before_a_source_fades_out_within_it(regions_s: Regions, spans: list[Span]) -> None:
    num_samples = 5000 if any(end > 4 for _, end in regions_s) else 4000
    planned = plan_spans(regions_s, num_source=3000, num_samples=num_samples, sample_rate_hz=RATE_HZ, source_start=1000)
    assert planned == tuple(spans)


def test_extensions_of_a_very_short_source_share_it() -> None:
    spans = plan_spans([(0, 1), (1.04, 2)], num_source=40, num_samples=2000, sample_rate_hz=RATE_HZ, source_start=1000)
    assert spans == (Span(0, 1030, 0, FADE), Span(1030, 2000, 10))


def test_a_region_over_a_short_source_at_the_end_reaches_the_end() -> None:
    regions_s = [(0.01, 0.146)]
    assert plan_spans(regions_s, num_source=27, num_samples=100, sample_rate_hz=RATE_HZ, source_start=71) == (
        Span(0, 100),
    )


def test_a_short_source_is_kept_completely_unless_continued() -> None:
    assert plan((1.0, 2.0), samples=5000) == (Span(1000, 2000, FADE, FADE), Span(3000, 5000, FADE))
    assert plan((4.0, 5.0), samples=5000) == (Span(3000, 5000, FADE),)
    assert plan((0.01, 1.0), source=10, samples=1000) == (Span(0, 1000, 10),)


def test_the_source_after_the_clips_end_is_ignored() -> None:
    assert plan((1.0, 2.0), source=9000, samples=2000) == (Span(1000, 2000, FADE, 0),)
    assert plan((2.5, 2.6), source=9000, samples=2000) == ()


def make_noise(num_samples: int, *, seed: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-2, 2, (2, num_samples)).astype(np.float32)


_MOMENTS = st.integers(0, 700).map(lambda n: n / RATE_HZ)


@given(
    regions_s=st.lists(st.tuples(_MOMENTS, _MOMENTS).filter(lambda pair: pair[0] < pair[1]), min_size=1, max_size=5),
    source=st.integers(1, 800),
    samples=st.integers(1, 600),
)
def test_samples_outside_the_regions_are_unchanged(regions_s: Regions, source: int, samples: int) -> None:
    spans = plan(*regions_s, source=source, samples=samples)
    kept = make_noise(max(source, samples), seed=1)
    kept[:, source:] = 0
    model = make_noise(samples, seed=2)
    audio = model.copy()
    generated = keep_source(audio, kept, spans=spans)
    inside = np.zeros(samples, dtype=bool)
    inside[source:] = True
    for start, end in ((int(start_s * RATE_HZ), int(end_s * RATE_HZ)) for start_s, end_s in regions_s):
        inside[start:end] = True
        if abs(start - source) < FADE and end >= source < samples:
            inside[max(source - FADE, 0) : source] = True
    np.testing.assert_array_equal(audio[:, ~inside], kept[:, :samples][:, ~inside])
    low, high = np.minimum(model, kept[:, :samples]) - 1e-6, np.maximum(model, kept[:, :samples]) + 1e-6
    assert ((low <= audio) & (audio <= high)).all()
    assert all(first.stop <= second.start for first, second in pairwise(spans))
    for span, part in zip(spans, generated, strict=True):
        np.testing.assert_array_equal(part.head, model[:, span.start : span.start + span.fade_in])
        np.testing.assert_array_equal(part.tail, model[:, span.stop - span.fade_out : span.stop])
        whole = slice(span.start + span.fade_in, span.stop - span.fade_out)
        np.testing.assert_array_equal(audio[:, whole], model[:, whole])


def test_fades_are_linear() -> None:
    audio = np.ones((1, 1000), np.float32)
    keep_source(audio, np.zeros((1, 1000), np.float32), spans=[Span(100, 400, 30, 20)])
    np.testing.assert_allclose(audio[0, 100:130], (np.arange(30) + 0.5) / 30, atol=1e-6)
    np.testing.assert_allclose(audio[0, 380:400], (np.arange(20)[::-1] + 0.5) / 20, atol=1e-6)
    assert fade_ramp(0).shape == (0,)
