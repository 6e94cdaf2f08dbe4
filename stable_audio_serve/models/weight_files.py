"""Reads weight files (safetensors, and pickles of tensors) without holding a whole file in memory.

Files are memory-mapped: a tensor's values are read from disk on first use.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.checkpoint_files import damaged

TRAINING_PREFIXES = ("diffusion.", "diffusion_ema.")
# A mapped file is unmapped after this many bytes were read, because they count as memory of the process until then.
MAPPED_BYTES = 128 * 2**20


def read_weights(path: Path) -> dict[str, Tensor]:
    """Returns all tensors of a file by key, on the CPU. Pickles are loaded with `weights_only`.

    Raises CheckpointError if the file is missing, corrupt, truncated, or a raw training checkpoint.
    """
    weights = _read_pickle(path) if path.suffix == ".ckpt" else _read_safetensors(path)
    if any(key.startswith(TRAINING_PREFIXES) for key in weights):
        raise CheckpointError(f"{path} is a raw training checkpoint; export it first, then serve the exported file")
    return weights


def drain_weights(
    path: Path, weights: dict[str, Tensor], *, kept: Collection[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Remove each key from `weights`, the result of `read_weights(path)`, and yield the key with its tensor.

    Keys in `kept` come first: the caller keeps these tensors memory-mapped and must not read their values yet. The
    other keys follow in the order of the file. To limit memory, the file is unmapped and mapped again after every
    `MAPPED_BYTES`. Raises CheckpointError if the file changes meanwhile.
    """
    identity = _identity(path)
    for key in kept:
        yield key, weights.pop(key)
    # If tensors were kept, map the file again at once: the kept mapping cannot be unmapped to free memory.
    read_bytes = MAPPED_BYTES if kept else 0
    for key in sorted(weights, key=lambda key: weights[key].data_ptr()):
        if read_bytes >= MAPPED_BYTES and _is_mapped(path):
            left = set(weights)
            weights.clear()
            weights.update((key, value) for key, value in read_weights(path).items() if key in left)
            if _identity(path) != identity or weights.keys() != left:
                raise CheckpointError(f"{path} was changed while it was loaded; load it again")
            read_bytes = 0
        tensor = weights.pop(key)
        read_bytes += tensor.nbytes
        yield key, tensor
        del tensor


def _identity(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        raise damaged(path, error) from error
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _is_mapped(path: Path) -> bool:
    """Whether a file can be memory-mapped. Pickles from before torch 1.6 cannot: they are not zip archives."""
    return path.suffix != ".ckpt" or zipfile.is_zipfile(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_mapped(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is corrupt or holds more than tensors, which is not loaded for safety; convert it to safetensors"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise damaged(path, error) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} does not hold a state_dict of tensors")
    return dict(state)
