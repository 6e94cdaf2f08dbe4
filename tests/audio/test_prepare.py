from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stable_audio_serve.audio.prepare import fix_channels, prepare_source
from stable_audio_serve.core.errors import InvalidUploadError
from stable_audio_serve.core.generation import SourceAudio
from tests.goldens import load_goldens

COMMON = load_goldens("common").tensors
STEREO = COMMON["audio/prepare/in_stereo"]
INPUTS = {
    "crop_to_200": STEREO,
    "pad_to_400": STEREO,
    "mono_to_stereo": STEREO[:1],
    "four_channels": torch.cat([STEREO, -STEREO]),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute with one thread, as the engine's planning threads do."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@pytest.mark.parametrize("case", INPUTS)
def test_matches_the_reference(case: str) -> None:
    expected = COMMON[f"audio/prepare/{case}"][0]
    source = SourceAudio(INPUTS[case].numpy(), 1000)
    prepared = prepare_source(source, sample_rate_hz=1000, channels=2, num_samples=expected.shape[1])
    assert torch.equal(prepared, expected)


def test_resampling_comes_before_the_crop() -> None:
    source = SourceAudio(COMMON["audio/resample_1500_1000/in"].numpy(), 1500)
    prepared = prepare_source(source, sample_rate_hz=1000, channels=2, num_samples=450)
    torch.testing.assert_close(prepared[:, :400], COMMON["audio/resample_1500_1000/out"], rtol=0, atol=1e-6)
    assert not prepared[:, 400:].any()


def test_an_unusual_rate_takes_little_longer_than_a_usual_one(one_thread: None) -> None:
    def measure_s(rate_hz: int) -> float:
        source = SourceAudio(np.zeros((2, 60 * rate_hz), dtype=np.float32), rate_hz)
        began_s = time.thread_time()
        prepare_source(source, sample_rate_hz=44_100, channels=2, num_samples=60 * 44_100)
        return time.thread_time() - began_s

    # The rates have no common divisor, so that 44,100 different filters are needed. Measured: 4 times as long as for
    # 48,000 Hz. With a convolution of the whole source for each 64 filters: 20 times for 60 s, 110 times for 120 s.
    assert min(measure_s(44_101) for _ in range(2)) < 10 * min(measure_s(48_000) for _ in range(2))


def test_channels_for_a_mono_model_are_averaged_and_too_few_are_refused() -> None:
    assert torch.equal(fix_channels(STEREO, 1), STEREO.mean(0, keepdim=True))
    with pytest.raises(InvalidUploadError, match="needs 6"):
        fix_channels(STEREO, 6)


@given(
    rate_hz=st.sampled_from([8000, 11025, 22050, 44056, 44100, 48000, 96000, 192_000]),
    model_rate_hz=st.sampled_from([16000, 32000, 44100, 48000]),
    num_samples=st.integers(1, 3000),
    wanted=st.integers(1, 3000),
    channels=st.integers(1, 2),
)
def test_a_source_of_any_rate_gets_the_exact_length(
    rate_hz: int, model_rate_hz: int, num_samples: int, wanted: int, channels: int
) -> None:
    source = SourceAudio(np.full((channels, num_samples), 0.5, dtype=np.float32), rate_hz)
    prepared = prepare_source(source, sample_rate_hz=model_rate_hz, channels=2, num_samples=wanted)
    assert prepared.shape == (2, wanted)
    assert prepared.isfinite().all()
    length = -(-num_samples * model_rate_hz // rate_hz)  # the source's resampled length, rounded up
    assert not prepared[:, length:].any()
    assert prepared[:, : min(length, wanted)].any()
