from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from stable_audio_serve.models.sa3.lengths import LengthRule, chunked_windows, plan_length


@st.composite
def rules(draw: st.DrawFn) -> LengthRule:
    rate_hz = draw(st.sampled_from([8000, 16000, 22050, 32000, 44100, 48000, 96000, 192_000]))
    hop, multiple = draw(st.sampled_from([512, 1024, 2048, 4096])), draw(st.sampled_from([1, 2, 16]))
    frames = multiple * draw(st.integers(1, 400))
    return LengthRule(sample_rate_hz=rate_hz, hop=hop, frame_multiple=multiple, max_samples=frames * hop)


@settings(max_examples=1000)
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


@settings(max_examples=300)
@given(frames=st.integers(1, 3000), size=st.integers(2, 200), data=st.data())
def test_windows_tile_the_frames_exactly(frames: int, size: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, size - 1))
    windows = chunked_windows(frames, size=size, overlap=overlap)
    assert [window.keep_start for window in windows] == [0, *(window.keep_stop for window in windows[:-1])]
    assert windows[-1].keep_stop == frames
    for window in windows:
        assert 0 <= window.start <= window.keep_start < window.keep_stop <= window.stop <= frames
        assert window.stop - window.start == min(size, frames)
