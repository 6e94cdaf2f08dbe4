"""A folded chain of adapters gives the same weight as the published formulas for whole weights, computed in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import Stacking
from stable_audio_serve.models.adapters.adapter import read_adapter
from stable_audio_serve.models.adapters.base import Base
from stable_audio_serve.models.adapters.fold import check_strength, fold
from tests.models.adapters.plain import (
    CONV,
    LINEAR,
    OTHER,
    TYPES,
    Change,
    dense_weight,
    fit_chain,
    make_base,
    make_change,
    read_change,
    slot_weight,
    write_adapter,
)
from tests.parameters import slow

NEAR = 3e-6  # allowed error relative to the largest weight; slots are float32


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=NEAR * max(1.0, float(expected.abs().max())), rtol=0)


def assert_folds(folder: Path, base: Base, changes: list[Change], *, stacking: Stacking = "chained") -> None:
    slot = fold(base, fit_chain(base, folder, changes), stacking=stacking)
    for layer in base.layers:
        expected = dense_weight(base.weight(layer), layer, changes, stacking=stacking)
        assert_same(slot_weight(base, slot, layer), expected)


@st.composite
def chains(draw: st.DrawFn) -> list[Change]:
    base, changes = make_base(), []
    for index in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(TYPES))
        strength = draw(st.floats(0.125 if "dora" in kind else -2.0, 2.0, width=32))
        layers = draw(st.sets(st.sampled_from((LINEAR, OTHER, CONV)), min_size=1))
        rank, alpha = draw(st.integers(1, 4)), draw(st.sampled_from((0.5, 2.0, 4.0)))
        changes.append(
            make_change(base, kind, rank=rank, alpha=alpha, strength=strength, seed=index, layers=sorted(layers))
        )
    return changes


@pytest.mark.parametrize("stacking", ["chained", "summed"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=chains())
def test_random_chains_match_whole_weights(tmp_path: Path, stacking: Stacking, changes: list[Change]) -> None:
    assert_folds(tmp_path, make_base(), changes, stacking=stacking)


@pytest.mark.parametrize("first", TYPES)
@pytest.mark.parametrize("second", TYPES)
@pytest.mark.parametrize("stacking", ["chained", slow("summed")])
def test_every_pair_of_types_stacks(tmp_path: Path, first: str, second: str, stacking: Stacking) -> None:
    base = make_base()
    changes = [make_change(base, first, strength=0.75), make_change(base, second, strength=2.0, rank=3, seed=2)]
    assert_folds(tmp_path, base, changes, stacking=stacking)


def test_order_matters_only_when_chained(tmp_path: Path) -> None:
    base = make_base()
    changes = [make_change(base, "lora"), make_change(base, "dora-rows", seed=2)]
    chain = fit_chain(base, tmp_path, changes)
    for stacking, equal in (("chained", False), ("summed", True)):
        one, other = (slot_weight(base, fold(base, order, stacking=stacking), LINEAR) for order in (chain, chain[::-1]))
        assert torch.allclose(one, other, atol=1e-5) == equal


def test_an_adapter_loads_on_layers_that_earlier_ones_skip(tmp_path: Path) -> None:
    base = make_base()
    changes = [make_change(base, "dora-rows", layers=[OTHER]), make_change(base, "lora", seed=2, layers=[LINEAR])]
    slot = fold(base, fit_chain(base, tmp_path, changes))
    assert set(slot.layers) == {LINEAR, OTHER}
    assert_same(slot_weight(base, slot, LINEAR), dense_weight(base.weight(LINEAR), LINEAR, changes))


def test_strength_zero_leaves_an_adapter_out(tmp_path: Path) -> None:
    base = make_base()
    one, other = fit_chain(base, tmp_path, [make_change(base, "dora-rows"), make_change(base, "lora", seed=2)])
    assert not fold(base, [(one[0], 0.0)]).layers
    left, alone = fold(base, [(one[0], 0.0), (other[0], 1.0)]), fold(base, [(other[0], 1.0)])
    assert all(torch.equal(*pair) for pair in zip(left.layers[LINEAR], alone.layers[LINEAR], strict=True))


def test_a_small_strength_keeps_the_magnitudes(tmp_path: Path) -> None:
    base = make_base()
    change = make_change(base, "dora-rows", strength=0.01)
    norms = slot_weight(base, fold(base, fit_chain(base, tmp_path, [change])), LINEAR).norm(dim=1)
    assert_same(norms, change.tensors[LINEAR]["magnitude"].double().abs())


@pytest.mark.parametrize("kind", TYPES)
def test_strengths_have_bounds(kind: str) -> None:
    low = 0.0 if "dora" in kind else -2.0
    for strength in (low, 1.0, 2.0):
        check_strength("vinyl", kind, strength=strength)
    for strength in (low - 0.01, 2.01, float("nan"), float("inf")):
        with pytest.raises(InvalidRequestError, match=r"'vinyl'.*strength") as caught:
            check_strength("vinyl", kind, strength=strength)
        assert caught.value.field == "loras"
        assert caught.value.allowed == f"{low:g} to 2"


@pytest.mark.parametrize("left", [3e-3, 3e-4, 1e-6])
def test_rows_that_an_adapter_cancels_keep_their_direction(tmp_path: Path, left: float) -> None:
    """A LoRA of full rank changes the weight to random values times `left`. A DoRA then restores row norms of 1."""
    base = make_base()
    weight = base.weight(LINEAR)
    identity, rest = torch.eye(11), torch.randn(7, 11)
    factors = {LINEAR: {"lora_A": identity, "lora_B": left * rest - weight}}
    update = {"lora_A": torch.zeros(1, 11), "lora_B": torch.zeros(7, 1), "magnitude": torch.ones(7)}
    changes = [Change("lora", 11.0, 1.0, factors), Change("dora-rows", 1.0, 1.0, {LINEAR: update})]
    slot = fold(base, fit_chain(base, tmp_path, changes))
    norms = slot_weight(base, slot, LINEAR).norm(dim=1)
    # The two float32 terms of the slot cancel, so that their rounding remains; the norms themselves are exact.
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=max(1e-5, 1e-6 / left), rtol=0)
    scale = 1 / (weight.double() + factors[LINEAR]["lora_B"].double()).norm(dim=1)
    torch.testing.assert_close(slot.layers[LINEAR].scale.double(), scale, atol=0, rtol=1e-6)


def test_the_bias_is_not_scaled(tmp_path: Path) -> None:
    base = make_base()
    change = make_change(base, "dora-rows")
    one = fold(base, fit_chain(base, tmp_path, [change])).layers[LINEAR]
    bias = base.bias(LINEAR)
    assert bias is not None
    assert_same(one.scale * bias + one.offset, bias)


@pytest.mark.parametrize("stacking", ["chained", "summed"])
def test_the_bias_of_a_row_of_zeros_is_kept(tmp_path: Path, stacking: Stacking) -> None:
    base = make_base()
    change = make_change(base, "dora-rows")
    base.weight(LINEAR)[2] = 0.0
    change.tensors[LINEAR]["lora_B"][2] = 0.0
    assert_folds(tmp_path, base, [change], stacking=stacking)
    one = fold(base, fit_chain(base, tmp_path, [change]), stacking=stacking).layers[LINEAR]
    bias = base.bias(LINEAR)
    assert bias is not None
    assert_same(one.scale * bias + one.offset, bias)


def test_the_stacked_rank_is_bounded(tmp_path: Path) -> None:
    base = make_base()
    chain = fit_chain(base, tmp_path, [make_change(base, "lora", rank=3)] * 2)
    assert fold(base, chain, max_rank=6).rank == 6
    with pytest.raises(InvalidRequestError, match="stacked rank of 6, the largest allowed is 5"):
        fold(base, chain, max_rank=5)


def test_values_that_overflow_are_refused(tmp_path: Path) -> None:
    base = make_base()
    change = Change("lora", 1.0, 2.0, {LINEAR: {"lora_A": torch.ones(1, 11), "lora_B": torch.full((7, 1), 3e38)}})
    with pytest.raises(InvalidRequestError, match="overflow"):
        fold(base, fit_chain(base, tmp_path, [change]))


@pytest.mark.parametrize("kind", ["lora-xs", "dora-rows-xs"])
def test_singular_vectors_of_the_file_are_used(tmp_path: Path, kind: str) -> None:
    base = make_base()
    change = make_change(base, kind, layers=[LINEAR])
    u, v, core = torch.randn(7, 2), torch.randn(11, 2), change.tensors[LINEAR]["M_xs"].float()
    parts = dict(change.tensors[LINEAR])
    given = Change(kind, 3.0, 1.0, {LINEAR: parts | {"U": u, "V": v}})
    same = {"lora_A": v.T, "lora_B": u @ core} | {part: parts[part] for part in ("magnitude",) if part in parts}
    slot = fold(base, fit_chain(base, tmp_path, [given]))
    plain = Change(kind.removesuffix("-xs"), 3.0, 1.0, {LINEAR: same})
    assert_same(slot_weight(base, slot, LINEAR), dense_weight(base.weight(LINEAR), LINEAR, [plain]))


def test_singular_vectors_are_computed_once_per_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, calls, eigh = make_base(), [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (calls.append(1), eigh(matrix))[1])
    for rank in (2, 2, 3, 3):
        base.fit(read_change(tmp_path, make_change(base, "lora-xs", rank=rank, layers=[LINEAR])))
    assert len(calls) == 2


def test_close_singular_values_are_a_warning(tmp_path: Path) -> None:
    base, changed = make_base(), make_base()
    u, values, v = torch.linalg.svd(base.weight(LINEAR), full_matrices=False)
    values[2] = values[1] * (1 - 1e-6)
    changed.layers[LINEAR].weight.copy_(u @ values.diag() @ v)
    adapter = read_change(tmp_path, make_change(base, "lora-xs", layers=[LINEAR]))
    assert not base.fit(adapter).warnings
    (warning,) = changed.fit(adapter).warnings
    assert "singular value" in warning


def test_a_rank_above_the_singular_vectors_is_refused(tmp_path: Path) -> None:
    base = make_base()
    with pytest.raises(InvalidRequestError, match="fewer singular vectors than rank 8"):
        base.fit(read_change(tmp_path, make_change(base, "lora-xs", rank=8, layers=[LINEAR])))


@pytest.mark.parametrize(
    ("layer", "part", "shape"),
    [(LINEAR, "lora_A", (2, 12)), (LINEAR, "lora_B", (8, 2)), (OTHER, "magnitude", (8,)), ("model.third", "", ())],
)
def test_another_base_is_named(tmp_path: Path, layer: str, part: str, shape: tuple[int, ...]) -> None:
    base = make_base()
    tensors = {name: dict(parts) for name, parts in make_change(base, "dora-rows").tensors.items()}
    if part:
        tensors[layer][part] = torch.zeros(shape)
    else:
        tensors[layer] = tensors.pop(LINEAR)
    with pytest.raises(InvalidRequestError, match=rf"made for another model.*{layer}") as caught:
        base.fit(read_change(tmp_path, Change("dora-rows", 2.0, 1.0, tensors)))
    assert "'small'" in str(caught.value)


@pytest.mark.parametrize(("error", "warns"), [(0.0, False), (0.04, False), (0.06, True), (-0.06, True)])
def test_row_norms_of_another_base_are_a_warning(tmp_path: Path, error: float, warns: bool) -> None:
    base = make_base()
    change = make_change(base, "dora-rows")
    tensors = {name: dict(parts) for name, parts in change.tensors.items()}
    plain = Change("lora", change.alpha, 1.0, change.tensors)
    for name, parts in tensors.items():
        bare = {name: {part: value for part, value in change.tensors[name].items() if part != "magnitude"}}
        plain = Change("lora", change.alpha, 1.0, bare)
        norms = dense_weight(base.weight(name), name, [plain]).norm(dim=1).float()
        norms[0] *= 1 + error
        parts["baked_vnorm_row"] = norms
    fitted = base.fit(read_change(tmp_path, Change("dora-rows", change.alpha, 1.0, tensors), norm_base="large-base"))
    assert bool(fitted.warnings) == warns
    assert all("(large-base) than 'small'" in warning for warning in fitted.warnings)


def test_an_adapter_of_the_prompts_projection_is_refused_by_name(tmp_path: Path) -> None:
    base = Base("small", {"conditioners.seconds_total.": torch.nn.ModuleDict({"embedder": torch.nn.Linear(4, 6)})})
    layer = "conditioners.prompt.proj_out"
    path = write_adapter(
        tmp_path / "a.safetensors", {layer: {"lora_A": torch.ones(1, 4), "lora_B": torch.ones(6, 1)}}, None
    )
    with pytest.raises(InvalidRequestError) as caught:
        base.fit(read_adapter(path, with_conditioners=True))
    assert caught.value.message == (
        f"adapter 'a' changes {layer}: of its conditioners, 'small' lets adapters change only seconds_total; "
        "load it without `conditioner`"
    )


def test_two_adapters_of_a_conditioner_are_a_warning(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name = "conditioners.seconds_total.embedder"
    base = Base("small", {"conditioners.seconds_total.": torch.nn.ModuleDict({"embedder": torch.nn.Linear(4, 6)})})
    tensors = {name: {"lora_A": torch.randn(1, 4), "lora_B": torch.randn(6, 1)}}
    path = write_adapter(tmp_path / "a.safetensors", tensors, None)
    adapter = base.fit(read_adapter(path, with_conditioners=True))
    assert not fold(base, [(adapter, 1.0)]).warnings
    assert "silence" in fold(base, [(adapter, 1.0), (adapter, 0.5)]).warnings[0]
