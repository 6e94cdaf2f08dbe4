from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch

from stable_audio_serve.audio import prepare
from stable_audio_serve.audio.prepare import resample
from tests.goldens import load_goldens

COMMON = load_goldens("common").tensors
CASES = sorted(key.removesuffix("/in") for key in COMMON if key.startswith("audio/resample_") and key.endswith("/in"))


@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case: str) -> None:
    from_hz, to_hz = (int(rate) for rate in case.split("_")[1:])
    result = resample(COMMON[f"{case}/in"], from_hz, to_hz=to_hz)
    torch.testing.assert_close(result, COMMON[f"{case}/out"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("from_hz", "to_hz", "length"),
    [(44100, 44100, 50), (8000, 44100, 1), (44100, 48000, 333), (96000, 44100, 2000), (7, 5, 100), (1000, 1, 2500)],
)
def test_resampling_matches_the_explicit_formula(from_hz: int, to_hz: int, length: int) -> None:
    samples = torch.randn(2, length, generator=torch.Generator().manual_seed(1))
    result = resample(samples, from_hz, to_hz=to_hz)
    o, n = from_hz // math.gcd(from_hz, to_hz), to_hz // math.gcd(from_hz, to_hz)
    assert result.shape == (2, math.ceil(n * length / o))
    if o == n:
        assert torch.equal(result, samples)
        return
    cutoff = 0.99 * min(o, n)
    at = torch.arange(result.shape[1], dtype=torch.float64)[:, None] / n
    t = ((torch.arange(length, dtype=torch.float64) / o - at) * cutoff).clamp(-6, 6)
    kernel = cutoff / o * torch.sinc(t) * torch.cos(math.pi * t / 12) ** 2
    torch.testing.assert_close(result.double(), samples.double() @ kernel.T, rtol=0, atol=2e-6)


def test_near_coprime_rates_are_correct_and_need_little_memory() -> None:
    tone = torch.sin(2 * math.pi * 440 * torch.arange(44101) / 44101)[None].float()
    result = resample(tone, 44101, to_hz=44100)
    expected = torch.sin(2 * math.pi * 440 * torch.arange(44100) / 44100)
    assert result.shape == (1, 44100)
    torch.testing.assert_close(result[0, 100:-100], expected[100:-100], rtol=0, atol=1e-3)


@pytest.mark.parametrize("limit", [1, 17, 146, 147, 148, 900, 5000])
def test_a_limit_gives_the_first_samples_of_the_whole(limit: int) -> None:
    samples = torch.randn(1, 1000, generator=torch.Generator().manual_seed(2))
    whole = resample(samples, 48000, to_hz=44100)
    limited = resample(samples, 48000, to_hz=44100, max_samples=limit)
    torch.testing.assert_close(limited, whole[:, :limit], rtol=0, atol=1e-6)


def test_a_short_clip_needs_only_its_own_weights() -> None:
    """The filter of almost coprime rates has a million weights, more than a short clip uses."""
    with patch.object(prepare, "_kernel", wraps=prepare._kernel) as kernel:
        resample(torch.zeros(1, 19_200), 191_999, to_hz=44_100)
    assert sum(len(call.args[0]) for call in kernel.call_args_list) == 4411
