"""Windows for decoding keep each audible latent frame once, have a halo on both sides, and decode few frames twice."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stable_audio_serve.models.protocol import WindowRule, WindowSpan
from stable_audio_serve.models.windows import LONGEST_FRAMES, audible_windows, chunked_windows, cut_windows

SMALL, MEDIUM, OPEN = WindowRule(2, 2), WindowRule(12), WindowRule(10)
RULES = st.sampled_from([SMALL, MEDIUM, OPEN, WindowRule(0), WindowRule(1), WindowRule(6, 3), WindowRule(0, 12)])


def assert_tiles(spans: Sequence[WindowSpan], *, end: int, frames: int, rule: WindowRule) -> None:
    assert [span.keep_start for span in spans] == [0, *(span.keep_stop for span in spans[:-1])]
    assert spans[-1].keep_stop >= end
    for span in spans:
        assert 0 <= span.start <= span.keep_start < span.keep_stop <= span.stop <= frames
        assert span.start % rule.multiple == 0
        assert span.start == 0 or span.keep_start - span.start >= rule.halo
        assert span.stop == frames or span.stop - span.keep_stop >= rule.halo


@given(rule=RULES, count=st.integers(1, 700), share=st.floats(0.01, 1))
def test_planned_windows_tile_the_audible_frames(rule: WindowRule, count: int, share: float) -> None:
    frames = count * rule.multiple
    audible = max(1, int(share * frames))
    spans = audible_windows(frames, num_audible=audible, rule=rule)
    covered = spans[-1].stop
    assert_tiles(spans, end=audible, frames=covered, rule=rule)
    assert covered == frames or covered >= audible + rule.halo
    assert covered == frames or covered % rule.multiple == 0  # a decoder pads a part of a chunk with zeros
    assert max(span.stop - span.start for span in spans) <= LONGEST_FRAMES


@pytest.mark.parametrize("halo", [255, 256, 257])
def test_a_large_halo_needs_few_windows(halo: int) -> None:
    spans = audible_windows(2000, num_audible=2000, rule=WindowRule(halo=halo, multiple=1))
    assert_tiles(spans, end=2000, frames=2000, rule=WindowRule(halo=halo, multiple=1))
    assert len(spans) <= 16


@given(rule=RULES, count=st.integers(1, 700), longest=st.integers(1, 600))
def test_windows_of_any_length_tile_the_clip(rule: WindowRule, count: int, longest: int) -> None:
    frames = count * rule.multiple
    spans = cut_windows(frames, rule=rule, longest=longest)
    assert_tiles(spans, end=frames, frames=frames, rule=rule)
    assert max(span.stop - span.start for span in spans) <= max(longest, 4 * rule.halo, 16) + 16 + rule.multiple


def redundant(spans: Sequence[WindowSpan], audible: int) -> float:
    """Returns the number of latent frames that the windows decode, divided by the number of audible ones."""
    return sum(span.stop - span.start for span in spans) / audible


@pytest.mark.parametrize(
    ("rule", "seconds", "before", "after"),
    [
        (SMALL, 5, 2.222, 1.185),
        (SMALL, 30, 1.585, 1.077),
        (SMALL, 120, 1.387, 1.039),
        (MEDIUM, 30, 1.585, 1.040),
        (MEDIUM, 120, 1.387, 1.059),
        (MEDIUM, 380, 1.345, 1.056),
    ],
)
def test_few_frames_are_decoded_twice(rule: WindowRule, seconds: int, before: float, after: float) -> None:
    """`after` is the number of decoded latent frames per audible frame with the model's rule for windows.

    For comparison, `before` is the same number with windows of 128 frames that overlap by 32.
    """
    audible = math.ceil(seconds * 44_100 / 4096)
    row = min(math.ceil((seconds + 6) * 44_100 / 4096 / 2) * 2, 4096)
    chunked = [span for span in chunked_windows(row) if span.keep_start < audible]
    for spans, share in ((chunked, before), (audible_windows(row, num_audible=audible, rule=rule), after)):
        assert sum(span.stop - span.start for span in spans) / audible == pytest.approx(share, abs=5e-4)
