from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stable_audio_serve.models.sa3.lengths import LengthRule, plan_length
from stable_audio_serve.models.windows import chunked_windows
from tests.goldens import SHARP, load_goldens
from tests.models.loaded import loaded

SHARP_LENGTHS = [(name, case) for name in SHARP for case in load_goldens(name).facts["components"]["lengths"]]
COMMON_LENGTHS = [case for case in load_goldens("common").facts["lengths"] if max(case["durations"]) > 0]


@st.composite
def rules(draw: st.DrawFn) -> LengthRule:
    rate_hz = draw(st.sampled_from([8000, 16000, 22050, 32000, 44100, 48000, 96000, 192_000]))
    hop, multiple = draw(st.sampled_from([512, 1024, 2048, 4096])), draw(st.sampled_from([1, 2, 16]))
    frames = multiple * draw(st.integers(1, 400))
    return LengthRule(sample_rate_hz=rate_hz, hop=hop, frame_multiple=multiple, max_samples=frames * hop)


@given(rule=rules(), share=st.floats(0, 1), padding_s=st.floats(0, 30))
def test_output_samples_are_exact_for_any_duration_and_rate(rule: LengthRule, share: float, padding_s: float) -> None:
    cap_s = rule.max_samples / rule.sample_rate_hz
    duration_s = max(share * cap_s, 1e-9)
    length = plan_length(duration_s, rule, padding_s=padding_s)
    assert length.output_samples == max(int(duration_s * rule.sample_rate_hz), 1)
    assert 1 <= length.effective_frames <= length.frames <= rule.max_frames
    assert length.effective_frames <= length.valid_frames <= length.frames
    assert length.frames % rule.frame_multiple == 0
    assert (
        length.output_samples
        <= length.valid_frames * rule.hop
        < length.output_samples + rule.hop * (2 + padding_s * rule.sample_rate_hz / rule.hop)
    )


@given(frames=st.integers(1, 3000), size=st.integers(2, 200), data=st.data())
def test_windows_tile_the_frames_and_keep_their_margins(frames: int, size: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, size - 1))
    windows = chunked_windows(frames, size=size, overlap=overlap)
    assert [window.keep_start for window in windows] == [0, *(window.keep_stop for window in windows[:-1])]
    assert windows[-1].keep_stop == frames
    for window in windows:
        assert 0 <= window.start <= window.keep_start < window.keep_stop <= window.stop <= frames
        assert window.stop - window.start == min(size, frames)
        assert window.keep_start == 0 or window.keep_start - window.start >= overlap // 2
        assert window.keep_stop == frames or window.stop - window.keep_stop >= overlap // 2


@pytest.mark.parametrize("case", COMMON_LENGTHS)
def test_lengths_of_the_official_models(case: dict[str, Any]) -> None:
    rule = LengthRule(
        sample_rate_hz=case["sample_rate"],
        hop=case["downsampling_ratio"],
        frame_multiple=(case["encoder_chunk_size"] or 32) // case["stride"],
        max_samples=case["sample_size"],
    )
    padding_s = case["duration_padding_sec"]
    frames = plan_length(max(case["durations"]), rule, padding_s=padding_s).frames
    rows = [plan_length(seconds, rule, padding_s=padding_s, frames=frames) for seconds in case["durations"]]
    assert frames == case["latent_length"]
    assert [row.effective_frames for row in rows] == case["effective_latents"]
    assert [row.valid_frames for row in rows] == case["valid_latents"]
    if len(set(case["durations"])) == 1:
        assert rows[0].output_samples == case["output_samples_after_truncation"][0]


@pytest.mark.parametrize(("name", "case"), SHARP_LENGTHS)
def test_lengths_of_checkpoints_with_other_dimensions(name: str, case: dict[str, Any]) -> None:
    rule = loaded(name).config.lengths
    assert (rule.sample_rate_hz, rule.hop, rule.max_samples) == (
        case["sample_rate"],
        case["hop"],
        case["sample_size"],
    )
    padding_s = case["duration_padding_sec"]
    frames = plan_length(max(case["durations"]), rule, padding_s=padding_s).frames
    rows = [plan_length(seconds, rule, padding_s=padding_s, frames=frames) for seconds in case["durations"]]
    assert frames == case["latent_length"] == case["audio_sample_size"] // case["hop"]
    assert [row.effective_frames for row in rows] == case["effective_latents"]
    assert [row.valid_frames for row in rows] == case["valid_latents"]
