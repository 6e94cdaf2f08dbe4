"""Rows of a batch with different slots get the results that they get alone, and plain rows keep their bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stable_audio_serve.models.adapters.apply import SlotBuffers, adapt
from stable_audio_serve.models.adapters.fold import LayerSlot, fold
from tests.models.adapters.plain import LINEAR, TYPES, dense_weight, fit_chain, make_base, make_change

TOKENS = 5


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def slots(tmp_path: Path) -> list[LayerSlot]:
    """One slot of each type, of ranks 1 to 4."""
    base = make_base()
    changes = [make_change(base, kind, rank=rank, seed=rank) for rank, kind in enumerate(TYPES, start=1)]
    return [fold(base, [pair]).layers[LINEAR] for pair in fit_chain(base, tmp_path, changes)]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, TOKENS, 11, generator=torch.Generator().manual_seed(3))


def layer(x: Tensor) -> Tensor:
    return make_base().layers[LINEAR](x)


def expected_row(x: Tensor, slot: LayerSlot) -> Tensor:
    """Returns the output with the slot's weight, in float64."""
    base = make_base()
    weight = slot.scale[:, None].double() * base.weight(LINEAR).double() + slot.b.double() @ slot.a.double()
    return F.linear(x.double(), weight, base.layers[LINEAR].bias.double()).float()


@pytest.mark.parametrize("kind", TYPES)
def test_a_row_has_the_output_of_the_changed_weight(tmp_path: Path, x: Tensor, kind: str) -> None:
    base, changes = make_base(), [make_change(make_base(), kind)]
    slot = fold(base, fit_chain(base, tmp_path, changes)).layers[LINEAR]
    weight = dense_weight(base.weight(LINEAR), LINEAR, changes)
    expected = F.linear(x.double(), weight, base.layers[LINEAR].bias.double()).float()
    torch.testing.assert_close(adapt(layer(x), x, groups=[(slice(None), slot)]), expected, atol=2e-5, rtol=1e-5)


def test_groups_have_the_bytes_that_they_have_alone(x: Tensor, slots: list[LayerSlot]) -> None:
    groups = [(slice(1, 3), slots[1]), (slice(3, 4), slots[3]), (slice(5, 6), slots[0])]
    out = adapt(layer(x), x, groups=groups)
    for group in groups:
        alone = adapt(layer(x), x, groups=[group])
        assert torch.equal(out[group[0]], alone[group[0]])
    plain = layer(x)
    for row in (0, 4):
        assert torch.equal(out[row], plain[row])
        assert not torch.equal(out[1], plain[1])


def test_tokens_of_packed_rows_are_units(x: Tensor, slots: list[LayerSlot]) -> None:
    tokens = x.flatten(0, 1)
    out = adapt(layer(tokens), tokens, groups=[(slice(2, 9), slots[1]), (slice(9, 12), slots[2])])
    torch.testing.assert_close(out[2:9], expected_row(tokens[2:9], slots[1]), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(out[9:12], expected_row(tokens[9:12], slots[2]), atol=2e-5, rtol=1e-5)
    assert torch.equal(out[:2], layer(tokens)[:2])


@pytest.mark.parametrize("way", ["rows", "tokens"])
def test_buffers_give_each_row_its_slot(x: Tensor, slots: list[LayerSlot], way: str) -> None:
    buffers = SlotBuffers(make_base().weight(LINEAR), slots=6, rank=4)
    for index, slot in enumerate(slots, start=1):
        buffers.write(index, slot)
    chosen = torch.tensor([2, 0, 4, 1, 3, 2])
    if way == "rows":
        out = buffers.adapt_rows(layer(x), x, slots=chosen)
    else:
        tokens = chosen.repeat_interleave(TOKENS)
        out = buffers.adapt_tokens(layer(x).flatten(0, 1), x.flatten(0, 1), slots=tokens).unflatten(0, (6, TOKENS))
    assert torch.equal(out[1], layer(x)[1])
    for row, index in enumerate(chosen.tolist()):
        if index:
            torch.testing.assert_close(out[row], expected_row(x[row], slots[index - 1]), atol=2e-5, rtol=1e-5)


def test_a_rewritten_buffer_keeps_nothing_of_its_last_slot(x: Tensor, slots: list[LayerSlot]) -> None:
    buffers, fresh = (SlotBuffers(make_base().weight(LINEAR), slots=2, rank=4) for _ in range(2))
    buffers.write(1, slots[3]._replace(a=torch.full_like(slots[3].a, 3e38)))  # x times this would overflow
    buffers.write(1, slots[0])
    fresh.write(1, slots[0])
    chosen = torch.ones(6, dtype=torch.int64)
    assert torch.equal(*(one.adapt_rows(layer(x), x, slots=chosen) for one in (buffers, fresh)))
    buffers.write(1, None)
    assert torch.equal(buffers.adapt_rows(layer(x), x, slots=chosen), layer(x))


def test_the_plain_slot_cannot_be_written(slots: list[LayerSlot]) -> None:
    buffers = SlotBuffers(make_base().weight(LINEAR), slots=2, rank=4)
    with pytest.raises(ValueError, match="slot 0 is plain"):
        buffers.write(0, slots[0])


def test_half_precision_outputs_are_adapted_in_float32(tmp_path: Path, x: Tensor) -> None:
    base = make_base()
    exact = make_base()
    for one in base.layers.values():
        one.bfloat16()
    change = make_change(exact, "dora-rows")
    slot = fold(base, fit_chain(base, tmp_path, [change])).layers[LINEAR]
    assert (slot.a.dtype, slot.b.dtype, slot.scale.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    half = x.bfloat16()
    out = adapt(base.layers[LINEAR](half), half, groups=[(slice(None), slot)])
    expected = F.linear(x, dense_weight(exact.weight(LINEAR), LINEAR, [change]).float(), exact.layers[LINEAR].bias)
    assert out.dtype == torch.bfloat16
    assert float((out - expected).abs().max() / expected.abs().max()) < 0.03
