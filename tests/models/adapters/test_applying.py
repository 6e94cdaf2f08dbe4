"""Rows of a batch with different adapters have the same results as alone. Rows without adapters are not changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stable_audio_serve.models.adapters.apply import adapt
from stable_audio_serve.models.adapters.fold import LayerSlot, Slot, fold
from stable_audio_serve.models.adapters.slot_table import PlacedSlot, SlotTable, TableRows
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
    """Returns the layer's output with the weight that the slot gives, computed in float64."""
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


def make_table(num_slots: int = 6, num_pages: int = 4) -> SlotTable:
    return SlotTable({LINEAR: make_base().layers[LINEAR]}, num_slots=num_slots, num_pages=num_pages)


def make_slot(*layers: LayerSlot) -> Slot:
    """Returns a slot that changes one layer, as `layers` says, or no layer if `layers` is empty."""
    return Slot(dict.fromkeys([LINEAR][: len(layers)], *layers), max((len(one.a) for one in layers), default=1), ())


def run_table(table: SlotTable, x: Tensor, placed: list[PlacedSlot], *, way: str = "rows") -> Tensor:
    """Returns the layer's output for rows `x` with the slots `placed`, computed as padded rows or as packed tokens."""
    slots = torch.tensor([one.index for one in placed], dtype=torch.int32)
    pages = torch.tensor([[page in one.pages for page in range(table.num_pages)] for one in placed]).int()
    if way == "rows":
        return TableRows(table, slots=slots, pages=pages, token_rows=None).adapt(layer(x), x, layer=LINEAR)
    tokens, rows = x.flatten(0, 1)[None], torch.arange(len(x), dtype=torch.int32).repeat_interleave(TOKENS)
    table_rows = TableRows(table, slots=slots, pages=pages, token_rows=rows)
    return table_rows.adapt(layer(tokens), tokens, layer=LINEAR)[0].unflatten(0, (len(x), TOKENS))


PLAIN = PlacedSlot(0, ())


@pytest.mark.parametrize("way", ["rows", "tokens"])
def test_a_table_gives_each_row_its_slot(x: Tensor, slots: list[LayerSlot], way: str) -> None:
    chosen = [1, None, 3, 0, 2, 1]
    wide = [one._replace(a=torch.cat([one.a] * 4), b=torch.cat([one.b / 4] * 4, 1)) for one in slots]
    table = make_table(num_pages=8)
    for own in (slots, wide):  # ranks up to 4, and up to 16, which take two pages
        whole = list(map(make_slot, own))
        places = table.place([whole[index] for index in chosen if index is not None])
        assert places is not None
        found = iter(places)
        out = run_table(table, x, [PLAIN if index is None else next(found) for index in chosen], way=way)
        assert torch.equal(out[1], layer(x)[1])
        for row, index in enumerate(chosen):
            if index is not None:
                torch.testing.assert_close(out[row], expected_row(x[row], slots[index]), atol=2e-5, rtol=1e-5)


def test_a_rewritten_slot_keeps_nothing_of_the_last_one(x: Tensor, slots: list[LayerSlot]) -> None:
    table, fresh = make_table(num_slots=2), make_table(num_slots=2)
    huge = make_slot(slots[3]._replace(a=torch.full_like(slots[3].a, 3e38)))  # x times this would overflow
    assert table.place([huge])
    own = make_slot(slots[0])
    outs = [run_table(one, x, (one.place([own]) or []) * 6) for one in (table, fresh)]
    assert torch.equal(*outs)
    plain = make_slot()
    assert torch.equal(run_table(table, x, (table.place([plain]) or []) * 6), layer(x))


def test_a_full_table_drops_what_was_used_least_recently(slots: list[LayerSlot]) -> None:
    table = make_table(num_slots=3, num_pages=4)
    first, second, third = (make_slot(one) for one in slots[:3])
    places = table.place([first, second])
    assert places is not None
    assert table.place([first]) == places[:1]
    assert table.place([third]) == places[1:]  # in place of the second
    assert table.place([first]) == places[:1]
    assert table.place([first, second, third]) is None
    del first
    assert table.place([second, third]) is not None


def test_a_chain_of_too_high_rank_does_not_fit(slots: list[LayerSlot]) -> None:
    table = make_table(num_pages=1)
    assert table.place([make_slot(slots[0])]) is not None
    assert table.place([replace(make_slot(slots[0]), rank=9)]) is None


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
