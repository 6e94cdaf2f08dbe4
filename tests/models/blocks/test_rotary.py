"""Normalizing and rotating (rotary embedding) queries and keys in one operation gives the same as in two operations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stable_audio_serve.models.blocks.norms import HEAD_NORMS, build_head_norm
from stable_audio_serve.models.blocks.rotary import RotaryEmbedding, gather_affine, rotate, without_affine

POSITIONS, HEADS, LAYERS = 7, 3, 2


def make_norm(kind: str, width: int, seed: int) -> nn.Module:
    norm = build_head_norm(kind, width)
    generator = torch.Generator().manual_seed(seed)
    for parameter in norm.parameters():
        parameter.data = torch.rand(parameter.shape, generator=generator) + 0.5
    return norm.requires_grad_(False)


def turn_pair_by_pair(x: Tensor, rotated: int) -> Tensor:
    """Apply the rotary embedding to x (batch, positions, heads, channels), one pair of channels after another.

    Only the first `rotated` channels are rotated. Channel j of their first half and channel j of their second half form
    a pair.
    """
    out, half = x.clone(), rotated // 2
    for position in range(x.shape[1]):
        for j in range(half):
            angle = position * 10000.0 ** (-2 * j / rotated)
            low, high = x[:, position, :, j], x[:, position, :, half + j]
            out[:, position, :, j] = low * math.cos(angle) - high * math.sin(angle)
            out[:, position, :, half + j] = high * math.cos(angle) + low * math.sin(angle)
    return out


@pytest.mark.parametrize("kind", HEAD_NORMS)
@pytest.mark.parametrize(("width", "rotated"), [(64, 32), (32, 32), (36, 32)])
def test_joint_rotation_equals_separate_rotation(kind: str, width: int, rotated: int) -> None:
    norms = [(make_norm(kind, width, 2 * layer), make_norm(kind, width, 2 * layer + 1)) for layer in range(LAYERS)]
    rotary = RotaryEmbedding(rotated)
    x = torch.randn(2, POSITIONS, 3, HEADS, width, generator=torch.Generator().manual_seed(9))[:, :, :2]
    table = gather_affine(norms, half=rotary.half_width).table(
        torch.arange(POSITIONS).float(), rates=rotary.rates(width)
    )
    for layer, pair in enumerate(norms):
        own = table.layer(layer)
        found = rotate(without_affine(pair[0], x, rate=own.rate), own, dtype=x.dtype)
        for part, norm in enumerate(pair):
            expected = turn_pair_by_pair(norm(x[:, :, part]), rotated)
            torch.testing.assert_close(found[:, :, part], expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("kind", HEAD_NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rotated_in_float32(kind: str, dtype: torch.dtype) -> None:
    norm, rotary = make_norm(kind, 64, 1), RotaryEmbedding(32)
    x = torch.randn(1, POSITIONS, 2, HEADS, 64, generator=torch.Generator().manual_seed(9)).to(dtype)
    table = (
        gather_affine([(norm, norm)], half=rotary.half_width)
        .table(torch.arange(POSITIONS).float(), rates=rotary.rates(64))
        .layer(0)
    )
    with torch.inference_mode():
        normed = without_affine(norm, x, rate=table.rate)
        found = rotate(normed, table, dtype=dtype)
    assert found.dtype == dtype
    assert torch.equal(found, rotate(normed.float(), table, dtype=torch.float32).to(dtype))


@pytest.mark.parametrize("kind", HEAD_NORMS)
def test_gradients_equal_those_of_separate_rotation(kind: str) -> None:
    pair = make_norm(kind, 32, 1).requires_grad_(), make_norm(kind, 32, 2).requires_grad_()
    rotary = RotaryEmbedding(32)
    x = torch.randn(1, POSITIONS, 2, HEADS, 32, generator=torch.Generator().manual_seed(9)).requires_grad_()
    weights = torch.randn(1, POSITIONS, 2, HEADS, 32, generator=torch.Generator().manual_seed(10))
    inputs = [x, *pair[0].parameters(), *pair[1].parameters()]

    table = (
        gather_affine([pair], half=rotary.half_width)
        .table(torch.arange(POSITIONS).float(), rates=rotary.rates(32))
        .layer(0)
    )
    together = rotate(without_affine(pair[0], x, rate=table.rate), table, dtype=x.dtype)
    apart = torch.stack([turn_pair_by_pair(norm(x[:, :, part]), 32) for part, norm in enumerate(pair)], dim=2)
    found, expected = (torch.autograd.grad((out * weights).sum(), inputs) for out in (together, apart))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
