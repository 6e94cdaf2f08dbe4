from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stable_audio_serve.models.blocks.norms import RMSNorm

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]),
]


def wide_stream(width: int, dtype: torch.dtype) -> Tensor:
    """Returns random values (3, width). They are so large that their squares overflow float16."""
    scale = torch.tensor([[300.0], [3e4], [6e4]])
    return (scale * torch.randn(3, width, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)).to(dtype)


def by_hand(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    exact = x.double()
    return exact / (exact.square().mean(-1, keepdim=True) + eps).sqrt() * gain.double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 1536])
def test_statistics_of_a_wide_stream_do_not_overflow_in_half_precision(
    device: str, dtype: torch.dtype, width: int
) -> None:
    norm = RMSNorm(width).to(device, dtype)
    x = wide_stream(width, dtype).to(device)
    with torch.inference_mode():
        norm.gamma.copy_(torch.linspace(0.5, 2.0, width))
        for normed, gain in ((norm(x), norm.gamma), (norm.without_gain(x), torch.ones(width, device=device))):
            assert normed.dtype == dtype
            expected = by_hand(x, gain, norm.eps)
            rounding = torch.finfo(dtype).eps
            torch.testing.assert_close(normed.double(), expected, rtol=2 * rounding, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_values_do_not_underflow(dtype: torch.dtype) -> None:
    x = torch.full((1, 64), 2e-4, dtype=dtype)  # so small that the squares are zero in float16
    expected = by_hand(x, torch.ones(64), 1e-12)
    torch.testing.assert_close(RMSNorm(64, eps=1e-12).to(dtype)(x).double(), expected, rtol=1e-2, atol=0)
