from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stable_audio_serve.models.blocks.attention import attend
from stable_audio_serve.models.blocks.band import BandAttention


def draw(batch: int, length: int) -> list[Tensor]:
    """Returns random queries, keys and values (batch, 2 heads, length, 8) that are not contiguous in memory."""
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(batch, length, 2, 8, generator=generator).transpose(1, 2) for _ in range(3)]


def by_mask(parts: list[Tensor], radius: int) -> Tensor:
    """Compute ordinary attention with a mask that hides all keys farther than `radius` from the query."""
    positions = torch.arange(parts[0].shape[2])
    hidden = (positions[:, None] - positions).abs() > radius
    return attend(*parts, mask=torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf")))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 5, 16, 17, 47, 100])
@pytest.mark.parametrize("radius", [1, 5, 20])
def test_band_attention_equals_masked_attention(batch: int, length: int, radius: int) -> None:
    parts = draw(batch, length)
    band = BandAttention(batch, length, radius=radius, block=16)
    with torch.inference_mode():
        assert band(*parts).shape == parts[0].shape
        torch.testing.assert_close(band(*parts), by_mask(parts, radius), rtol=0, atol=2e-6)
        others = [part * 0.5 for part in parts]  # the object is used again for the next layer's inputs
        torch.testing.assert_close(band(*others), by_mask(others, radius), rtol=0, atol=2e-6)


def test_non_finite_values_stay_in_their_row() -> None:
    parts = draw(3, 30)
    expected = by_mask(parts, 5)
    for part in parts:
        part[1] = float("nan")
    with torch.inference_mode():
        found = BandAttention(3, 30, radius=5, block=16)(*parts)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=0, atol=2e-6)
