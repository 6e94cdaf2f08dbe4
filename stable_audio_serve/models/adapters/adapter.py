"""Reads adapter files (LoRA and its relatives) of Stable Audio 3 and checks that each is complete in itself.

Knows nothing of the network that an adapter changes. Files are untrusted: sizes are bounded, nothing is allocated by a
size that a header states, and every defect becomes an InvalidRequestError that names the adapter.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from stable_audio_serve.core.errors import InvalidRequestError

AdapterType = Literal["lora", "dora-rows", "lora-xs", "dora-rows-xs"]
CONDITIONERS = "conditioners."  # prefix of the names of layers outside the denoiser
MAX_RANK = 256
MAX_FILE_BYTES = 2**31

_NEEDED: Mapping[AdapterType, tuple[str, ...]] = {  # the tensors of every layer; the first has the rank as first axis
    "lora": ("lora_A", "lora_B"),
    "dora-rows": ("lora_A", "lora_B", "magnitude"),
    "lora-xs": ("M_xs",),
    "dora-rows-xs": ("M_xs", "magnitude"),
}
_OPTIONAL = ("U", "V", "baked_vnorm_row")
_UNSERVED = ("dora-cols", "dora-cols-xs", "bora", "bora-xs")
_RANK_AXES = {"lora_A": (0,), "lora_B": (1,), "M_xs": (0, 1), "U": (1,), "V": (1,)}  # other tensors are vectors
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_HEADER_BYTES = 2**20  # the header of a large adapter has 0.2 MB
_MAX_ALPHA = 2**16
_MAX_PATTERNS = 1000
_KEY = re.compile(r"(.+)\.parametrizations\.weight\.(\d+)\.(\w+)")
_RANGE = re.compile(r"\[(\d{1,9})-(\d{1,9})\]")
_DOTLESS_RANGE = re.compile(r"(?<=\w)(?=\[\d+-\d+\])")
_READ = (
    "; adapters are read in the format of Stable Audio 3's trainers: a safetensors file with tensors like"
    " model.transformer.layers.0.self_attn.to_qkv.parametrizations.weight.0.lora_A"
)
_FOREIGN = {  # format -> how its tensors are named
    "in the PEFT format": re.compile(r"base_model\.|.*\.lora_[AB]\.(default\.)?weight"),
    "in the format of kohya and ComfyUI": re.compile(r"lora_(unet|te)|.*(lora_(up|down)\b|\.alpha$)"),
}
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter file in memory: by layer, its tensors by name, in the file's dtypes and on the CPU.

    Every layer has `lora_A` (rank, in) and `lora_B` (out, rank), or in types that end with -xs `M_xs` (rank, rank) and
    possibly `U` (out, rank) and `V` (in, rank). DoRA types also have `magnitude` (out,), and possibly
    `baked_vnorm_row` (out,): the weight's row norms at strength 1 on the model `norm_base`. `scaling` is alpha / rank.
    `warnings` are sentences for the log.
    """

    name: str
    type: AdapterType
    rank: int
    scaling: float
    layers: Mapping[str, Mapping[str, Tensor]]
    sha256: str
    norm_base: str
    warnings: tuple[str, ...]


def refuse_adapter(name: str, reason: str, *, allowed: str | None = None) -> InvalidRequestError:
    """Returns the error for an adapter that cannot be used. `reason` continues the sentence `adapter X`."""
    return InvalidRequestError(f"adapter {name!r} {_printable(reason)}", field="loras", allowed=allowed)


def _printable(text: str) -> str:
    """Returns a text from a file without characters that could change a log or a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def read_adapter(
    path: Path,
    *,
    name: str | None = None,
    max_rank: int = MAX_RANK,
    max_bytes: int = MAX_FILE_BYTES,
    with_conditioners: bool = False,
) -> Adapter:
    """Read an adapter file. Without `name`, the adapter is named like the file without suffix.

    Tensors for conditioners are left out unless `with_conditioners`: two adapters that both change the embedding of
    the duration can together render silence. Raises InvalidRequestError if the file cannot be used.
    """
    name = path.stem if name is None else name
    try:
        data = _read_bytes(path, max_bytes)
        config = _read_config(data)
        layers = _group(_read_tensors(data))
        sha256 = hashlib.sha256(data).hexdigest()
        del data
        kind = _resolve_type(config.get("adapter_type"), layers)
        chosen, warnings = _choose_layers(layers, config)
        chosen = [layer for layer in chosen if with_conditioners or not layer.startswith(CONDITIONERS)]
        if not chosen:
            raise _UnusableError("changes no layer" + ("" if with_conditioners else " of the denoiser"))
        rank = _resolve_rank(config, layers, kind=kind, max_rank=max_rank)
        alpha = _number(config, "alpha", low=-_MAX_ALPHA, high=_MAX_ALPHA)
        checked = {layer: _check_layer(layer, layers[layer], kind=kind, rank=rank) for layer in chosen}
    except _UnusableError as error:
        raise refuse_adapter(name, str(error)) from error.__cause__
    if unused := {part for parts in layers.values() for part in parts} - {*_NEEDED[kind], *_OPTIONAL}:
        warnings.append(f"type {kind} does not use the tensors {', '.join(sorted(unused))[:200]}")
    return Adapter(
        name=name,
        type=kind,
        rank=rank,
        scaling=1.0 if alpha is None else alpha / rank,
        layers=checked,
        sha256=sha256,
        norm_base=_printable(str(config.get("norm_base") or "")[:80]),
        warnings=tuple(f"adapter {name!r}: {warning}" for warning in warnings),
    )


class _UnusableError(Exception):
    """The reason why a file cannot be used."""


def _damaged(reason: object) -> _UnusableError:
    return _UnusableError(f"is corrupt or incomplete ({' '.join(str(reason).split())[:200]}); fetch it again")


def _read_bytes(path: Path, max_bytes: int) -> bytes:
    """Returns the bytes of a safetensors file, and refuses other formats."""
    if path.suffix in _PICKLES:
        raise _UnusableError(f"is a pickle ({path.suffix}), which is not loaded for safety{_READ}")
    try:
        if path.is_dir():
            raise _UnusableError(f"is a folder{_READ}")
        if not path.is_file():
            raise _UnusableError(f"was not found: there is no file {path.name}")
        if path.stat().st_size > max_bytes:
            raise _UnusableError(f"is larger than {max_bytes} bytes")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise _UnusableError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if data[8:9] != b"{":
        kinds = {b"GGUF": "is a GGUF file", b"PK\3\4": "is a pickle, which is not loaded for safety"}
        raise _UnusableError(f"{kinds.get(data[:4], 'is not a safetensors file')}{_READ}")
    return data


def _read_config(data: bytes) -> dict[str, Any]:
    """Returns the object under the metadata key `lora_config`, empty if absent. Refuses names that occur twice."""
    size = int.from_bytes(data[:8], "little")
    if size > min(_MAX_HEADER_BYTES, len(data) - 8):
        raise _damaged(f"it states a header of {size} bytes")
    header = _parse(data[8 : 8 + size])
    metadata = header.get("__metadata__", {})
    config = metadata.get("lora_config") if isinstance(metadata, dict) else None
    return _parse(config) if config and isinstance(config, str) else {}


def _parse(text: str | bytes) -> dict[str, Any]:
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(error) from error
    if not isinstance(values, dict):
        raise _damaged("its header or lora_config is not a JSON object")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(values := dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _read_tensors(data: bytes) -> dict[str, Tensor]:
    try:
        return load(data)  # checks every size and position against the length of `data`
    except (SafetensorError, ValueError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
        raise _damaged(error) from error


def _group(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors by layer and name. The index in a key is only the adapter's position in its trainer."""
    layers: dict[str, dict[str, Tensor]] = {}
    indices: dict[str, str] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            formats = (label for label, names in _FOREIGN.items() if any(map(names.match, tensors)))
            what = next((f"is {label}" for label in formats), f"holds {key[:200]}, which is no part of an adapter")
            raise _UnusableError(what + _READ)
        layer, index, part = match.groups()
        if indices.setdefault(layer, index) != index:
            raise _UnusableError(f"holds several adapters for {layer[:200]}; save each to its own file")
        layers.setdefault(layer, {})[part] = tensor
    return layers


def _resolve_type(stated: object, layers: Mapping[str, Mapping[str, Tensor]]) -> AdapterType:
    """Returns the type. The legacy type `dora` has magnitudes by rows, unless they are stored as a row vector."""
    kind = stated or "lora"
    if kind == "dora":
        shapes = (parts["magnitude"].shape for parts in layers.values() if "magnitude" in parts)
        shape = next(shapes, torch.Size())
        kind = "dora-cols" if len(shape) == 2 and shape[0] == 1 else "dora-rows"
    for served in _NEEDED:
        if kind == served:
            return served
    what = "is not served" if kind in _UNSERVED else "is unknown"
    raise _UnusableError(f"has type {str(kind)[:40]}, which {what}; served types: {', '.join(_NEEDED)}")


def _resolve_rank(
    config: Mapping[str, Any], layers: Mapping[str, Mapping[str, Tensor]], *, kind: AdapterType, max_rank: int
) -> int:
    """Returns the rank that the file states, or else the one of its first matrix."""
    first = _NEEDED[kind][0]
    shape = next((parts[first].shape for parts in layers.values() if first in parts), None)
    stated = _number(config, "rank", low=1, high=2**31)
    rank = stated or (shape[0] if shape else 1)
    if not 1 <= rank <= max_rank or rank != math.floor(rank):
        raise _UnusableError(f"has rank {rank:.12g}, allowed: 1 to {max_rank}")
    return int(rank)


def _number(config: Mapping[str, Any], key: str, *, low: float, high: float) -> float | None:
    """Returns a number of `lora_config`, None if absent."""
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise _UnusableError(f"has an unusable {key} in its lora_config: {str(value)[:40]}")
    return value


def _choose_layers(layers: Mapping[str, object], config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Returns the layers that the patterns `include` and `exclude` leave, and warnings."""
    warnings: list[str] = []
    include, exclude = (_expand(config.get(key), warnings) for key in ("include", "exclude"))
    left = [
        layer
        for layer in layers
        if (not include or any(text in layer for text in include)) and not any(text in layer for text in exclude)
    ]
    if len(left) < len(layers):
        warnings.append(f"include and exclude leave out {len(layers) - len(left)} layers of the file")
    return left, warnings


def _expand(patterns: object, warnings: list[str]) -> list[str]:
    """Returns the texts that patterns stand for: `layers.[0-5]` is six. Appends warnings.

    A layer is selected if its name contains a text, so that `layers.1` also selects layer 10, as in the reference.
    """
    given = [patterns] if isinstance(patterns, str) else patterns or []
    if not isinstance(given, list) or not all(isinstance(pattern, str) for pattern in given):
        raise _UnusableError("has an include or exclude in its lora_config that is not a list of texts")
    texts: list[str] = []
    for pattern in given:
        dotted = _DOTLESS_RANGE.sub(".", pattern.strip())
        if dotted != pattern.strip():
            warnings.append(f"{pattern[:80]!r} is read as {dotted[:80]!r}")
        ranges = [sorted(map(int, found)) for found in _RANGE.findall(dotted)]
        if len(texts) + math.prod(high - low + 1 for low, high in ranges) > _MAX_PATTERNS:
            raise _UnusableError("has an include or exclude in its lora_config that stands for too many names")
        expanded = [dotted]
        for low, high in ranges:
            numbers = range(low, high + 1)
            expanded = [_RANGE.sub(str(number), text, count=1) for text in expanded for number in numbers]
        texts += expanded
    return texts


def _check_layer(layer: str, parts: Mapping[str, Tensor], *, kind: AdapterType, rank: int) -> dict[str, Tensor]:
    """Returns the tensors that the type uses. Refuses missing ones and wrong shapes, dtypes or values."""
    bases = ("U", "V") if kind.endswith("-xs") and ("U" in parts or "V" in parts) else ()
    used = {part: parts.get(part) for part in (*_NEEDED[kind], *bases)}
    used |= {part: parts[part] for part in ("baked_vnorm_row",) if part in parts and "magnitude" in used}
    checked: dict[str, Tensor] = {}
    for part, tensor in used.items():
        where = f"{layer[:200]}.{part}"
        if tensor is None:
            raise _UnusableError(f"has no {where}, which type {kind} needs")
        axes = _RANK_AXES.get(part)
        tensor = tensor.flatten() if axes is None and tensor.dim() == 2 and 1 in tensor.shape else tensor
        if tensor.dim() != (2 if axes else 1) or any(tensor.shape[axis] != rank for axis in axes or ()):
            raise _UnusableError(f"has {where} of shape {list(tensor.shape)}, which does not fit rank {rank}")
        if tensor.dtype not in _DTYPES:
            raise _UnusableError(f"has {where} of dtype {tensor.dtype}, not floating-point numbers")
        if not bool(tensor.isfinite().all()):
            raise _UnusableError(f"has values in {where} that are not finite")
        checked[part] = tensor
    return checked
