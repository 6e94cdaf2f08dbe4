"""Sources are cut into overlapping windows, and decoded windows are joined, trimmed and checked."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from stable_audio_serve.core.clock import SystemClock
from stable_audio_serve.engine.hardware.device import open_device
from stable_audio_serve.engine.scheduling.windows import AudioAssembly, SourceEncoding, num_in_turn
from stable_audio_serve.models.protocol import SourcePlan
from stable_audio_serve.models.windows import LONGEST_FRAMES
from stable_audio_serve.sampling.noise import SeededNoise
from tests.factories import make_windows

DEVICE = open_device(torch.device("cpu"), clock=SystemClock())


@given(frames=st.integers(1, 1200))
def test_source_windows_join_without_seams(frames: int) -> None:
    samples = torch.arange(frames * 4.0).repeat(2, 1)
    noise = SeededNoise(0)
    encoding = SourceEncoding(SourcePlan(samples, frames, make_windows(frames)), stage="init", noise=noise, hop=4)
    while encoding.lengths_left:
        windows = encoding.pending()
        assert len(windows) == 1 or sum(window.samples.shape[1] // 4 for window in windows) <= LONGEST_FRAMES
        for window in windows:
            encoding.put(window.samples[:1, ::4])
    torch.testing.assert_close(encoding.latents(), samples[:1, ::4], rtol=0, atol=0)


def test_a_window_longer_than_the_limit_has_a_turn_alone() -> None:
    assert num_in_turn([LONGEST_FRAMES + 1, 1]) == 1


def test_latents_outside_the_windows_of_a_source_are_zero() -> None:
    samples = torch.arange(1, 801.0).repeat(2, 1)
    first, second, *_ = make_windows(200)
    noise = SeededNoise(0)
    encoding = SourceEncoding(SourcePlan(samples, 200, (second,)), stage="inpaint", noise=noise, hop=4)
    (window,) = encoding.pending()
    encoding.put(window.samples[:1, ::4])
    expected = torch.zeros(1, 200)
    expected[:, second.keep_start : second.keep_stop] = samples[:1, ::4][:, second.keep_start : second.keep_stop]
    assert first.keep_stop == second.keep_start > 0
    torch.testing.assert_close(encoding.latents(), expected, rtol=0, atol=0)


@given(frames=st.integers(1, 1200), valid_share=st.floats(0, 1), length_share=st.floats(0.01, 1))
def test_audio_windows_are_joined_trimmed_and_padded_with_silence(
    frames: int, valid_share: float, length_share: float
) -> None:
    hop, valid = 4, int(frames * valid_share)
    samples = max(1, int(frames * hop * length_share))
    latents = torch.rand(2, frames)
    audio = AudioAssembly(
        make_windows(frames), device=DEVICE, channels=2, hop=hop, valid_frames=valid, output_samples=samples
    )
    while audio.lengths_left:
        for window in audio.pending(latents, SeededNoise(0)):
            audio.put(window.latents.repeat_interleave(hop, dim=1))
    expected = latents.repeat_interleave(hop, dim=1).numpy()
    expected[:, valid * hop :] = 0
    np.testing.assert_array_equal(audio.audio(), expected[:, :samples])


def test_windows_after_the_end_of_the_clip_are_not_decoded() -> None:
    audio = AudioAssembly(make_windows(200), device=DEVICE, channels=2, hop=4, valid_frames=200, output_samples=50)
    assert audio.lengths_left == (32,)


def test_audio_keeps_its_level_and_non_finite_audio_is_detected() -> None:
    audio = AudioAssembly(make_windows(2), device=DEVICE, channels=1, hop=2, valid_frames=2, output_samples=4)
    audio.put(torch.tensor([[-3.0, 0.5, 3.0, float("nan")]]))
    np.testing.assert_array_equal(audio.audio()[:, :3], [[-3.0, 0.5, 3.0]])
    assert not audio.is_finite
