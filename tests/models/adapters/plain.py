"""Adapter files for tests, a small network that the adapters change, and an independent computation of the change.

`dense_weight` computes the changed weight by the published formulas, one adapter after another, in float64. It does not
use the package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stable_audio_serve.models.adapters.adapter import Adapter, read_adapter
from stable_audio_serve.models.adapters.base import Base, FittedAdapter
from stable_audio_serve.models.adapters.fold import Slot

TYPES = ("lora", "dora-rows", "lora-xs", "dora-rows-xs")
LINEAR, OTHER, CONV = "model.first", "model.layers.0.second", "model.conv"


class Net(nn.Module):
    """Two linear layers, one wider than long with bias and one longer than wide without bias, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(11, 7)
        self.layers = nn.ModuleList([nn.ModuleDict({"second": nn.Linear(6, 9, bias=False)})])
        self.conv = nn.Conv1d(8, 8, 1, bias=False)


def make_base(seed: int = 0) -> Base:
    """Returns a base with random weights."""
    torch.manual_seed(seed)
    return Base("small", {"model.": Net().requires_grad_(False)})


@dataclass(frozen=True, slots=True)
class Change:
    """One adapter of a chain: its type, alpha, strength, and the tensors of each layer."""

    type: str
    alpha: float
    strength: float
    tensors: dict[str, dict[str, Tensor]]

    @property
    def rank(self) -> int:
        parts = next(iter(self.tensors.values()))
        return len(parts["M_xs"] if "M_xs" in parts else parts["lora_A"])


def make_change(
    base: Base,
    kind: str,
    *,
    rank: int = 2,
    alpha: float = 3.0,
    strength: float = 1.0,
    seed: int = 1,
    layers: Sequence[str] = (LINEAR, OTHER, CONV),
) -> Change:
    """Returns random tensors for an adapter, in float16 like real files. Some magnitudes are negative."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).half()

    tensors = {}
    for layer in layers:
        out, width = base.weight(layer).shape
        is_small = kind.endswith("-xs")
        parts = {"M_xs": draw(rank, rank)} if is_small else {"lora_A": draw(rank, width), "lora_B": draw(out, rank)}
        tensors[layer] = parts | ({"magnitude": draw(out)} if "dora" in kind else {})
    return Change(kind, alpha, strength, tensors)


def write_adapter(path: Path, tensors: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any] | None) -> Path:
    """Write an adapter file, without metadata if `config` is None."""
    named = {
        f"{layer}.parametrizations.weight.0.{part}": tensor.clone().contiguous()
        for layer, parts in tensors.items()
        for part, tensor in parts.items()
    }
    save_file(named, path, metadata=None if config is None else {"lora_config": json.dumps(config)})
    return path


def read_change(folder: Path, change: Change, **config: Any) -> Adapter:
    """Write a change to a file and read it."""
    values = {"rank": change.rank, "alpha": change.alpha, "adapter_type": change.type} | config
    return read_adapter(write_adapter(folder / "adapter.safetensors", change.tensors, values))


def fit_chain(base: Base, folder: Path, changes: Sequence[Change]) -> list[tuple[FittedAdapter, float]]:
    return [(base.fit(read_change(folder, change)), change.strength) for change in changes]


def dense_weight(weight: Tensor, layer: str, changes: Sequence[Change], *, stacking: str = "chained") -> Tensor:
    """Returns the changed weight (out, in) float64."""
    original, current = weight.double(), weight.double()
    for change in changes:
        if layer not in change.tensors or change.strength == 0:
            continue
        if stacking == "chained":
            current = _change_weight(current, original, change, layer=layer, strength=change.strength)
        else:
            alone = _change_weight(original, original, change, layer=layer, strength=1.0)
            current = current + change.strength * (alone - original)
    return current


def _change_weight(current: Tensor, original: Tensor, change: Change, *, layer: str, strength: float) -> Tensor:
    parts = {part: tensor.double() for part, tensor in change.tensors[layer].items()}
    if "M_xs" in parts:
        u, _, v = torch.linalg.svd(original, full_matrices=False)
        u, v = u[:, : change.rank], v[: change.rank]
        signs = torch.sign(u[u.abs().argmax(0), torch.arange(change.rank)])
        update = (u * signs) @ parts["M_xs"] @ (v * signs[:, None])
    else:
        update = parts["lora_B"] @ parts["lora_A"]
    changed = current + strength * change.alpha / change.rank * update
    if "magnitude" in parts:
        changed = parts["magnitude"][:, None] * changed / (changed.norm(dim=1, keepdim=True) + 1e-12)
    return changed


def slot_weight(base: Base, slot: Slot, layer: str) -> Tensor:
    """Returns the layer's weight (out, in) float64 as the slot changes it."""
    weight = base.weight(layer).double()
    if layer not in slot.layers:
        return weight
    one = slot.layers[layer]
    return one.scale[:, None].double() * weight + one.b.double() @ one.a.double()
