"""Reads adapter files (LoRA and its relatives) of Stable Audio 3 and checks that each file is complete.

`base` later checks that an adapter fits a network. `header` checks everything that needs no tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from stable_audio_serve.models.adapters.header import (
    MAX_RANK,
    AdapterType,
    UnusableError,
    damaged,
    naming,
    open_file,
    parse_header,
)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter file in memory.

    `layers` maps the name of a layer to the layer's tensors by name, in the file's dtypes and on the CPU. Every layer
    has `lora_A` (rank, in) and `lora_B` (out, rank). In types that end with -xs, it has `M_xs` (rank, rank) instead,
    and possibly `U` (out, rank) and `V` (in, rank). DoRA types also have `magnitude` (out,), and possibly
    `baked_vnorm_row` (out,): the row norms of the weight of the model `norm_base`, changed by the adapter at strength
    1. `scaling` is alpha / rank. `warnings` are sentences for the log.
    """

    name: str
    type: AdapterType
    rank: int
    scaling: float
    layers: Mapping[str, Mapping[str, Tensor]]
    sha256: str
    norm_base: str
    warnings: tuple[str, ...]


def read_adapter(
    path: Path,
    *,
    name: str | None = None,
    max_rank: int = MAX_RANK,
    with_conditioners: bool = False,
) -> Adapter:
    """Read an adapter file.

    Without `name`, the adapter's name is the file's name without the suffix. Tensors for conditioners are left out
    unless `with_conditioners` is true, see `parse_header`. Raises InvalidRequestError if the file cannot be used.
    """
    name = path.stem if name is None else name
    with naming(name):
        with open_file(path) as file:
            data = file.read()
        header = parse_header(
            data, num_bytes=len(data), name=name, max_rank=max_rank, with_conditioners=with_conditioners
        )
        tensors = _read_tensors(data)
        sha256 = hashlib.sha256(data).hexdigest()
        del data
        layers = {
            layer: {part: _check_values(f"{layer[:200]}.{part}", tensors[entry.key]) for part, entry in parts.items()}
            for layer, parts in header.layers.items()
        }
    return Adapter(
        name=name,
        type=header.type,
        rank=header.rank,
        scaling=header.scaling,
        layers=layers,
        sha256=sha256,
        norm_base=header.norm_base,
        warnings=header.warnings,
    )


def _read_tensors(data: bytes) -> dict[str, Tensor]:
    try:
        return load(data)  # checks every size and position against the length of `data`
    except (SafetensorError, ValueError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
        raise damaged(error) from error


def _check_values(where: str, tensor: Tensor) -> Tensor:
    """Returns the tensor, flattened if it is a vector. Raises UnusableError if a value is not finite."""
    if not bool(tensor.isfinite().all()):
        raise UnusableError(f"has values in {where} that are not finite")
    is_vector = where.endswith((".magnitude", ".baked_vnorm_row"))
    return tensor.flatten() if is_vector else tensor
