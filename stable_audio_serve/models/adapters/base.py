"""The linear layers of a network that adapters can change, and adapters fitted to them.

Everything here depends on the base weights and on one adapter, but not on strengths or on other adapters. It is
therefore computed once for each adapter. It is computed on the device of the weights if that is a CPU or a CUDA device,
else on the CPU: Apple's GPUs have no float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.models.adapters.adapter import Adapter
from stable_audio_serve.models.adapters.header import CONDITIONERS, AdapterType, refuse_adapter
from stable_audio_serve.models.adapters.singular import SingularBases, SingularBasis, matrix

_ROWS_AT_ONCE = 256  # rows of a weight converted to float64 at once: more would not stay in the processor's cache
_NORM_TOLERANCE = 0.05  # if row norms differ by more than this factor, the adapter was made for another model


@dataclass(frozen=True, slots=True)
class FittedLayer:
    """An adapter's update B A of one layer's weight, without strength and scaling.

    `a` (rank, in) has the dtype of the weight; `b` (out, rank) and `magnitude` (out,) are float32. `magnitude` is None
    unless the type is a DoRA type. `along` (out,) float64 is the scalar product of each row of B A with the same row of
    the weight. `squares` (out,) float64 is the squared norm of each row of B A.
    """

    a: Tensor
    b: Tensor
    magnitude: Tensor | None
    along: Tensor
    squares: Tensor


@dataclass(frozen=True, slots=True)
class FittedAdapter:
    """An adapter whose layers fit a base. `scaling` is alpha / rank. `warnings` are sentences for the log."""

    name: str
    type: AdapterType
    rank: int
    scaling: float
    layers: Mapping[str, FittedLayer]
    sha256: str
    warnings: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        parts = ((one.a, one.b, one.magnitude, one.along, one.squares) for one in self.layers.values())
        return sum(tensor.nbytes for layer in parts for tensor in layer if tensor is not None)


def adaptable_layers(modules: Mapping[str, nn.Module]) -> dict[str, nn.Linear | nn.Conv1d]:
    """Returns the layers that adapters can change, by their names in adapter files.

    The keys of `modules` are prefixes: the name of a layer is a key and the layer's path in that network.
    """
    return {
        prefix + path: module
        for prefix, network in modules.items()
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d)
    }


class Base:
    """The layers of a network that adapters can change, by their names in adapter files.

    Caches the row norms of the weights, which all adapters need.
    """

    def __init__(self, name: str, modules: Mapping[str, nn.Module], *, folder: Path | None = None) -> None:
        """`modules` has the networks that adapters can change, as in `adaptable_layers`.

        The singular vectors of the weights are stored in `folder` for later processes.
        """
        self.name = name
        self.layers = adaptable_layers(modules)
        self._squared_norms: dict[str, Tensor] = {}
        self._singular = SingularBases(self.layers, folder=folder)

    def weight(self, layer: str) -> Tensor:
        """Returns a layer's weight as a matrix (out, in), on a device that has float64."""
        return _exact(matrix(self.layers[layer]))

    def bias(self, layer: str) -> Tensor | None:
        """Returns a layer's bias (out,), on the device of `weight`."""
        bias = self.layers[layer].bias
        return None if bias is None else _exact(bias.detach())

    def squared_norms(self, layer: str) -> Tensor:
        """Returns the squared norms (out,) float64 of the rows of a layer's weight."""
        if layer not in self._squared_norms:
            weight = self.weight(layer)
            self._products(layer, weight.new_empty(0, weight.shape[1]))
        return self._squared_norms[layer]

    def fit(self, adapter: Adapter) -> FittedAdapter:
        """Returns the adapter, ready to be folded. Raises InvalidRequestError if it was made for another network."""
        for layer, parts in adapter.layers.items():
            self._check_shapes(adapter, layer, parts=parts)
        needed = [layer for layer, parts in adapter.layers.items() if _needs_basis(parts)]
        bases = self._singular.compute(needed, adapter.rank)
        ambiguous = [layer for layer, basis in bases.items() if basis.is_ambiguous]
        layers: dict[str, FittedLayer] = {}
        foreign = []
        for layer, parts in adapter.layers.items():
            layers[layer] = fitted = self._fit_layer(layer, parts, basis=bases.get(layer))
            if "baked_vnorm_row" in parts and not self._has_norms(layer, fitted, adapter=adapter):
                foreign.append(layer)
        warnings = list(adapter.warnings)
        if ambiguous:
            warnings.append(
                f"adapter {adapter.name!r}: the last singular value used of {_join(ambiguous)} is almost equal to the"
                " next, so that the adapter may have been trained with other singular vectors"
            )
        if foreign:
            made_for = f" ({adapter.norm_base})" if adapter.norm_base else ""
            warnings.append(
                f"adapter {adapter.name!r} was made for another model{made_for} than {self.name!r}: it states row norms"
                f" of {_join(foreign)} that differ by more than {_NORM_TOLERANCE:.0%}"
            )
        return FittedAdapter(
            adapter.name, adapter.type, adapter.rank, adapter.scaling, layers, adapter.sha256, tuple(warnings)
        )

    def _check_shapes(self, adapter: Adapter, layer: str, *, parts: Mapping[str, Tensor]) -> None:
        if layer not in self.layers:
            if layer.startswith(CONDITIONERS):
                known = {name.split(".")[1] for name in self.layers if name.startswith(CONDITIONERS)}
                reason = f"of its conditioners, {self.name!r} lets adapters change only {', '.join(sorted(known))}"
                raise refuse_adapter(adapter.name, f"changes {layer[:200]}: {reason}; load it without `conditioner`")
            raise _other_model(adapter, f"{self.name!r} has no layer {layer[:200]}")
        out, width = self.weight(layer).shape
        sizes = {"lora_A": width, "V": width}
        for part, tensor in parts.items():
            found, size = tensor.shape[1 if part == "lora_A" else 0], sizes.get(part, out)
            if part != "M_xs" and found != size:
                raise _other_model(adapter, f"{layer}.{part} is for {found} features, {self.name!r} has {size}")
        if _needs_basis(parts) and adapter.rank > min(out, width):
            raise _other_model(adapter, f"{layer} has fewer singular vectors than rank {adapter.rank}")

    def _fit_layer(self, layer: str, parts: Mapping[str, Tensor], *, basis: SingularBasis | None) -> FittedLayer:
        weight = self.weight(layer)
        if "M_xs" not in parts:
            a, b = parts["lora_A"], parts["lora_B"].float()
        else:
            u, v = (basis.u, basis.v) if basis else (parts["U"].float(), parts["V"].float())
            a, b = v.T.contiguous(), u @ parts["M_xs"].float()
        a, b = a.to(weight), b.to(weight.device)
        exact_a, exact_b = a.double(), b.double()
        along = (self._products(layer, a) * exact_b).sum(1)
        squares = ((exact_b @ (exact_a @ exact_a.T)) * exact_b).sum(1)
        magnitude = parts["magnitude"].to(weight.device, torch.float32) if "magnitude" in parts else None
        return FittedLayer(a, b, magnitude, along, squares)

    def _products(self, layer: str, a: Tensor) -> Tensor:
        """Returns W A^T (out, rank) float64 for `a` (rank, in). Also caches the row norms of W if they are missing."""
        weight, exact = self.weight(layer), a.double()
        buffer = weight.new_empty(min(len(weight), _ROWS_AT_ONCE), weight.shape[1], dtype=torch.float64)
        products, squares = [], []
        for rows in weight.split(_ROWS_AT_ONCE):
            exact_rows = buffer[: len(rows)].copy_(rows)
            products.append(exact @ exact_rows.T)  # with the long side last, the product is a third faster
            if layer not in self._squared_norms:
                squares.append(torch.linalg.vector_norm(exact_rows, dim=1).square())
        if squares:
            self._squared_norms[layer] = torch.cat(squares)
        return torch.cat(products, dim=1).T

    def _has_norms(self, layer: str, fitted: FittedLayer, *, adapter: Adapter) -> bool:
        """Whether the row norms of the changed weight at strength 1 are close to the norms stored in the file."""
        stated = adapter.layers[layer]["baked_vnorm_row"].to(fitted.along)
        squares = self.squared_norms(layer) + adapter.scaling * (2 * fitted.along + adapter.scaling * fitted.squares)
        return bool(((squares.clamp(min=0).sqrt() - stated).abs() <= _NORM_TOLERANCE * stated.abs()).all())


def _exact(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "cuda" else tensor.cpu()


def _needs_basis(parts: Mapping[str, Tensor]) -> bool:
    """Whether a layer's update needs singular vectors that the adapter file does not store."""
    return "M_xs" in parts and "U" not in parts


def _other_model(adapter: Adapter, reason: str) -> InvalidRequestError:
    return refuse_adapter(adapter.name, f"was made for another model: {reason}")


def _join(layers: list[str]) -> str:
    return layers[0] if len(layers) == 1 else f"{layers[0]} and {len(layers) - 1} other layers"
