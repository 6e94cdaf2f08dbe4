"""With adapters, the denoiser and the number conditioner give the stored outputs of the reference code.

Cases without a stored output are compared with a denoiser whose whole weights are changed in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import Stacking
from stable_audio_serve.models.adapters.adapter import read_adapter
from stable_audio_serve.models.adapters.apply import RowSlots, adapting
from stable_audio_serve.models.adapters.base import Base, FittedAdapter
from stable_audio_serve.models.adapters.fold import Slot, fold
from stable_audio_serve.models.sa3.denoiser import Denoiser
from stable_audio_serve.verification.verify import BOUNDS
from tests.goldens import load_goldens
from tests.models.adapters.plain import dense_weight, fit_chain, make_change
from tests.models.loaded import assert_near, loaded

NAME = "tiny-s"
FOLDER = load_goldens(NAME).folder / "lora"
SERVED = ("lora_all", "dora_rows_layers", "lora_xs_layer1")


@cache
def base() -> Base:
    model = loaded(NAME)
    return Base(NAME, model.adaptable)


@cache
def fitted(name: str) -> FittedAdapter:
    return base().fit(read_adapter(FOLDER / f"{name}.safetensors", with_conditioners=True))


@cache
def stored() -> dict[str, Tensor]:
    return load_file(FOLDER / "lora_golden.safetensors")


def adapted(slot: Slot) -> AbstractContextManager[None]:
    """Returns a context in which the slot applies to every row."""
    return adapting(base().layers, RowSlots([(slice(None), slot)]))


def run_network(net: Denoiser) -> Tensor:
    """Returns the output for the stored inputs."""
    g = load_goldens(NAME).tensors
    with torch.no_grad():
        conditioning = net.condition(g["dit/cross_attn_cond"], g["dit/global_cond"], local=g["dit/local_add_cond"])
        return net(g["dit/x"], g["dit/t"], conditioning=conditioning)


def run_slot(slot: Slot) -> Tensor:
    with adapted(slot):
        return run_network(loaded(NAME).denoiser)


def run(chain: Sequence[tuple[FittedAdapter, float]]) -> Tensor:
    return run_slot(fold(base(), chain))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", SERVED)
def test_one_adapter_matches_the_reference(name: str, strength: float) -> None:
    expected = stored()[f"{name}/strength_{strength}/dit_out"]
    assert_near(run([(fitted(name), strength)]), expected, within=BOUNDS["denoiser"])


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_number_conditioner_matches_the_reference(strength: float) -> None:
    with torch.no_grad(), adapted(fold(base(), [(fitted("lora_all"), strength)])):
        found = loaded(NAME).numbers["seconds_total"](torch.tensor([2.337]))[:, None]
    assert_near(found, stored()[f"lora_all/strength_{strength}/number_2.337"], within=BOUNDS["number"])


@pytest.mark.parametrize(
    ("key", "strengths"),
    [("lora_all+dora_rows_layers", (1.0, 1.0)), ("lora_all_1.0+dora_rows_layers_0.25", (1.0, 0.25))],
)
def test_a_chain_of_two_matches_the_reference(key: str, strengths: tuple[float, float]) -> None:
    chain = [(fitted("lora_all"), strengths[0]), (fitted("dora_rows_layers"), strengths[1])]
    assert_near(run(chain), stored()[f"stack_{key}/dit_out"], within=BOUNDS["denoiser"])


def test_the_reference_loses_layers_that_are_new_in_a_chain() -> None:
    """In the reference code, a second adapter changes only layers that the first one changes; here, all layers."""
    first, second = fitted("dora_rows_layers"), read_adapter(FOLDER / "lora_all.safetensors")
    kept = {layer: parts for layer, parts in second.layers.items() if layer in first.layers}
    expected = stored()["stack_dora_rows_layers+lora_all/dit_out"]
    assert_near(
        run([(first, 1.0), (base().fit(replace(second, layers=kept)), 1.0)]), expected, within=BOUNDS["denoiser"]
    )
    whole = run([(first, 1.0), (base().fit(second), 1.0)])
    assert float((whole - expected).abs().max()) > 0.1


@pytest.mark.parametrize(("name", "kind"), [("dora_cols_attn", "dora-cols"), ("bora_ff", "bora")])
def test_types_with_column_norms_are_refused_by_name(name: str, kind: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name!r} has type {kind}, which is not served"):
        read_adapter(FOLDER / f"{name}.safetensors")


CHAINS = {
    "dora-rows-xs": [("dora-rows-xs", 1.0)],
    "strength 2": [("dora-rows", 2.0)],
    "strength -2": [("lora-xs", -2.0)],
    "chain of three": [("dora-rows", 0.4), ("lora", -0.7), ("dora-rows-xs", 1.5)],
}


@pytest.mark.parametrize("stacking", ["chained", "summed"])
@pytest.mark.parametrize("chain", CHAINS)
def test_the_denoiser_matches_one_with_whole_weights(tmp_path: Path, chain: str, stacking: Stacking) -> None:
    layers = [layer for layer in base().layers if not layer.startswith("conditioners.")]
    changes = []
    for seed, (kind, strength) in enumerate(CHAINS[chain]):
        change = make_change(base(), kind, alpha=0.02, strength=strength, seed=seed, layers=layers)
        for layer, parts in change.tensors.items():
            if "magnitude" in parts:
                parts["magnitude"] = (0.01 * parts["magnitude"] + base().weight(layer).norm(dim=1)).half()
        changes.append(change)
    whole = copy.deepcopy(loaded(NAME).denoiser)
    for layer in layers:
        weight = whole.get_submodule(layer.removeprefix("model.")).weight
        weight.data = dense_weight(base().weight(layer), layer, changes, stacking=stacking).float().view_as(weight)
    slot, plain = fold(base(), fit_chain(base(), tmp_path, changes), stacking=stacking), fold(base(), [])
    assert_near(run_slot(slot), run_network(whole), within=BOUNDS["denoiser"])
    assert float((run_slot(slot) - run_slot(plain)).abs().max()) > 0.01
