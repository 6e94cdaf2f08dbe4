"""Checks adapter files (LoRA and its relatives) of Stable Audio 3 by their safetensors header, without torch.

Files are untrusted: sizes are limited, and no memory is allocated from a size that a header states. Every defect raises
an InvalidRequestError that names the adapter.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from stable_audio_serve.core.errors import InvalidRequestError

AdapterType = Literal["lora", "dora-rows", "lora-xs", "dora-rows-xs"]
CONDITIONERS = "conditioners."  # prefix of the names of layers outside the denoiser
SUFFIX = ".safetensors"
MAX_RANK = 256
MAX_FILE_BYTES = 2**31

_NEEDED: Mapping[AdapterType, tuple[str, ...]] = {  # tensors of a layer; the first axis of the first one is the rank
    "lora": ("lora_A", "lora_B"),
    "dora-rows": ("lora_A", "lora_B", "magnitude"),
    "lora-xs": ("M_xs",),
    "dora-rows-xs": ("M_xs", "magnitude"),
}
_OPTIONAL = ("U", "V", "baked_vnorm_row")
_UNSERVED = ("dora-cols", "dora-cols-xs", "bora", "bora-xs")
# The axes whose length is the rank. Tensors that are not listed are vectors.
_RANK_AXES = {"lora_A": (0,), "lora_B": (1,), "M_xs": (0, 1), "U": (1,), "V": (1,)}
_DTYPES = ("F16", "BF16", "F32", "F64")
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
_FOREIGN = {  # format -> how its tensors are named; the first match counts
    "a whole checkpoint, not an adapter": re.compile(r"pretransform\.|conditioner\.conditioners\."),
    "in the PEFT format": re.compile(r"base_model\.|.*\.lora_[AB]\.(\w+\.)?weight"),
    "in the format of kohya, LyCORIS, diffusers or ComfyUI": re.compile(
        r"(lora|lycoris|oft|boft)_[a-z]|.*(lora[._](up|down)\b|\.(alpha|dora_scale|diff|hada_w\w+|lokr_w\w+|oft_\w+)$)"
    ),
}
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as the header describes it. `dtype` is safetensors' name of the dtype.

    Vectors may have the shape of a matrix with one row or one column.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """The checked header of an adapter file. `layers` has all tensors that the type uses, by layer and name.

    `scaling` is alpha / rank. `norm_base` is the model on which the stored row norms were computed. `warnings` are
    sentences for the log.
    """

    type: AdapterType
    rank: int
    scaling: float
    layers: Mapping[str, Mapping[str, Entry]]
    norm_base: str
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FileFacts:
    """The header of an adapter file, the file's SHA-256 and its size."""

    header: Header
    sha256: str
    num_bytes: int


def refuse_adapter(name: str, reason: str, *, allowed: str | None = None) -> InvalidRequestError:
    """Returns the error for an adapter that cannot be used. The message is "adapter", the name and `reason`."""
    return InvalidRequestError(f"adapter {name!r} {_printable(reason)}", field="loras", allowed=allowed)


def _printable(text: str) -> str:
    """Replace characters that are not printable, since a file could otherwise change a log or a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


class UnusableError(Exception):
    """The reason why a file cannot be used."""


def damaged(reason: object) -> UnusableError:
    """Returns the error for a corrupt or incomplete file."""
    return UnusableError(f"is corrupt or incomplete ({' '.join(str(reason).split())[:200]}); fetch it again")


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Within this context, an UnusableError becomes an InvalidRequestError that names the adapter."""
    try:
        yield
    except UnusableError as error:
        raise refuse_adapter(name, str(error)) from error.__cause__


def inspect_file(
    path: Path,
    *,
    name: str,
    max_rank: int = MAX_RANK,
    with_conditioners: bool = False,
) -> FileFacts:
    """Read the header of an adapter file and hash the file. Raises InvalidRequestError if the file cannot be used.

    Does not check the values of the tensors; `adapter.read_adapter` does.
    """
    with naming(name), open_file(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        start = file.read(min(num_bytes, 8 + _MAX_HEADER_BYTES))
        header = parse_header(
            start, num_bytes=num_bytes, name=name, max_rank=max_rank, with_conditioners=with_conditioners
        )
        try:
            with safe_open(path, framework="numpy"):  # checks where each tensor is, and its size
                pass
        except SafetensorError as error:
            raise damaged(error) from error
        file.seek(0)
        return FileFacts(header, hashlib.file_digest(file, "sha256").hexdigest(), num_bytes)


@contextmanager
def open_file(path: Path) -> Iterator[BufferedReader]:
    """Open a safetensors file. Raises UnusableError if it is in another format, too large or not readable."""
    if path.suffix in _PICKLES:
        raise UnusableError(f"is a pickle ({path.suffix}), which is not loaded for safety{_READ}")
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UnusableError(f"is a folder{_READ}")
        if not stat.S_ISREG(mode):  # opening it might block
            raise UnusableError(f"is not a file{_READ}")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                raise UnusableError(f"is larger than {MAX_FILE_BYTES} bytes")
            start = file.read(9)
            if start[8:] != b"{":
                kinds = {b"GGUF": "is a GGUF file", b"PK\3\4": "is a pickle, which is not loaded for safety"}
                raise UnusableError(f"{kinds.get(start[:4], 'is not a safetensors file')}{_READ}")
            file.seek(0)
            yield file
    except FileNotFoundError as error:
        raise UnusableError(f"was not found: there is no file {path.name}") from error
    except (OSError, ValueError) as error:
        raise UnusableError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


def parse_header(start: bytes, *, num_bytes: int, name: str, max_rank: int, with_conditioners: bool) -> Header:
    """Returns the header from `start`, the first bytes of a file of `num_bytes`. Raises UnusableError.

    Does not check where the tensors are in the file; safetensors does.

    Tensors for conditioners are left out unless `with_conditioners` is true: two adapters that both change the
    embedding of the duration can together render silence.
    """
    size = int.from_bytes(start[:8], "little")
    if size > min(_MAX_HEADER_BYTES, num_bytes - 8):
        raise damaged(f"it states a header of {size} bytes")
    values = _parse(start[8 : 8 + size])
    metadata = values.pop("__metadata__", {})
    config_text = metadata.get("lora_config") if isinstance(metadata, dict) else None
    config = _parse(config_text) if config_text and isinstance(config_text, str) else {}
    entries = {key: _read_entry(key, value) for key, value in values.items()}
    layers = _group(entries)
    kind = _resolve_type(config.get("adapter_type"), layers)
    chosen, warnings = _choose_layers(layers, config)
    if not with_conditioners and (of_conditioners := [layer for layer in chosen if layer.startswith(CONDITIONERS)]):
        chosen = [layer for layer in chosen if layer not in of_conditioners]
        warnings.append(f"its changes of {', '.join(of_conditioners)[:200]} are left out without `conditioner: true`")
    if not chosen:
        raise UnusableError("changes no layer" + ("" if with_conditioners else " of the denoiser"))
    rank = _resolve_rank(config, layers, kind=kind, max_rank=max_rank)
    alpha = _number(config, "alpha", low=-_MAX_ALPHA, high=_MAX_ALPHA)
    checked = {layer: _check_layer(layer, layers[layer], kind=kind, rank=rank) for layer in chosen}
    if unused := {part for parts in layers.values() for part in parts} - {*_NEEDED[kind], *_OPTIONAL}:
        warnings.append(f"type {kind} does not use the tensors {', '.join(sorted(unused))[:200]}")
    if unread := [key for key in config if re.search("rank|alpha", key) and key not in ("rank", "alpha")]:
        warnings.append(f"its lora_config has {', '.join(unread)[:200]}, of which only rank and alpha are read")
    return Header(
        type=kind,
        rank=rank,
        scaling=1.0 if alpha is None else alpha / rank,
        layers=checked,
        norm_base=_printable(str(config.get("norm_base") or "")[:80]),
        warnings=tuple(f"adapter {name!r}: {_printable(warning)}" for warning in warnings),
    )


def _parse(text: str | bytes) -> dict[str, Any]:
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise damaged(error) from error
    if not isinstance(values, dict):
        raise damaged("its header or lora_config is not a JSON object")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(values := dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _read_entry(key: str, value: object) -> Entry:
    match value:
        case {"dtype": str(dtype), "shape": list(shape)}:
            if all(type(size) is int and size >= 0 for size in shape):
                return Entry(key, dtype, tuple(shape))
    raise damaged(f"the entry of {key[:100]} is malformed")


def _group(entries: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """Returns the tensors by layer and name.

    A key also has an index: the number of the adapter in the trainer that wrote the file. All keys of a layer must have
    the same index.
    """
    layers: dict[str, dict[str, Entry]] = {}
    indices: dict[str, str] = {}
    for key, entry in entries.items():
        match = _KEY.fullmatch(key)
        if match is None:
            formats = (label for label, names in _FOREIGN.items() if any(map(names.match, entries)))
            what = next((f"is {label}" for label in formats), f"holds {key[:200]}, which is no part of an adapter")
            raise UnusableError(what + _READ)
        layer, index, part = match.groups()
        if indices.setdefault(layer, index) != index:
            raise UnusableError(f"holds several adapters for {layer[:200]}; save each to its own file")
        layers.setdefault(layer, {})[part] = entry
    return layers


def _resolve_type(stated: object, layers: Mapping[str, Mapping[str, Entry]]) -> AdapterType:
    """Returns the adapter type. The old name `dora` means `dora-cols` if a magnitude is (1, n), else `dora-rows`."""
    kind = stated or "lora"
    if kind == "dora":
        shapes = (parts["magnitude"].shape for parts in layers.values() if "magnitude" in parts)
        shape = next(shapes, ())
        kind = "dora-cols" if len(shape) == 2 and shape[0] == 1 else "dora-rows"
    for served in _NEEDED:
        if kind == served:
            return served
    what = "is not served" if kind in _UNSERVED else "is unknown"
    raise UnusableError(f"has type {str(kind)[:40]}, which {what}; served types: {', '.join(_NEEDED)}")


def _resolve_rank(
    config: Mapping[str, Any], layers: Mapping[str, Mapping[str, Entry]], *, kind: AdapterType, max_rank: int
) -> int:
    """Returns the rank that the file states. If it states none, returns the rank of the first matrix."""
    first = _NEEDED[kind][0]
    shape = next((parts[first].shape for parts in layers.values() if first in parts), None)
    stated = _number(config, "rank", low=1, high=2**31)
    rank = stated or (shape[0] if shape else 1)
    if not 1 <= rank <= max_rank or rank != math.floor(rank):
        raise UnusableError(f"has rank {rank:.12g}, allowed: 1 to {max_rank}")
    return int(rank)


def _number(config: Mapping[str, Any], key: str, *, low: float, high: float) -> float | None:
    """Returns a number of `lora_config`, None if absent."""
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UnusableError(f"has an unusable {key} in its lora_config: {json.dumps(value)[:40]}")
    return value


def _choose_layers(layers: Mapping[str, object], config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Returns the layers that the file's patterns `include` and `exclude` select, and warnings."""
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
    """Expand the ranges in patterns: `layers.[0-5]` becomes six texts. Appends to `warnings`.

    A layer is selected if its name contains a text, so that `layers.1` also selects layer 10, as in the reference
    implementation.
    """
    given = [patterns] if isinstance(patterns, str) else patterns or []
    if not isinstance(given, list) or not all(isinstance(pattern, str) for pattern in given):
        raise UnusableError("has an include or exclude in its lora_config that is not a list of texts")
    texts: list[str] = []
    for pattern in given:
        dotted = _DOTLESS_RANGE.sub(".", pattern.strip())
        if dotted != pattern.strip():
            warnings.append(f"{pattern[:80]!r} is read as {dotted[:80]!r}")
        ranges = [sorted(map(int, found)) for found in _RANGE.findall(dotted)]
        if len(texts) + math.prod(high - low + 1 for low, high in ranges) > _MAX_PATTERNS:
            raise UnusableError("has an include or exclude in its lora_config that stands for too many names")
        expanded = [dotted]
        for low, high in ranges:
            numbers = range(low, high + 1)
            expanded = [_RANGE.sub(str(number), text, count=1) for text in expanded for number in numbers]
        texts += expanded
    return texts


def _check_layer(layer: str, parts: Mapping[str, Entry], *, kind: AdapterType, rank: int) -> dict[str, Entry]:
    """Returns the layer's tensors that the type uses.

    Raises UnusableError if one is missing or has a wrong shape or dtype.
    """
    bases = ("U", "V") if kind.endswith("-xs") and ("U" in parts or "V" in parts) else ()
    used = {part: parts.get(part) for part in (*_NEEDED[kind], *bases)}
    used |= {part: parts[part] for part in ("baked_vnorm_row",) if part in parts and "magnitude" in used}
    checked: dict[str, Entry] = {}
    for part, entry in used.items():
        where = f"{layer[:200]}.{part}"
        if entry is None:
            raise UnusableError(f"has no {where}, which type {kind} needs")
        axes = _RANK_AXES.get(part)
        is_flat = axes is None and (len(entry.shape) == 1 or (len(entry.shape) == 2 and 1 in entry.shape))
        is_matrix = axes is not None and len(entry.shape) == 2 and all(entry.shape[axis] == rank for axis in axes)
        if not (is_flat or is_matrix):
            raise UnusableError(f"has {where} of shape {list(entry.shape)}, which does not fit rank {rank}")
        if entry.dtype not in _DTYPES:
            raise UnusableError(f"has {where} of dtype {entry.dtype[:20]}, not floating-point numbers")
        checked[part] = entry
    return checked
