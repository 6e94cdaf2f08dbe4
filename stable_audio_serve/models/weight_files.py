"""Reads weight files (safetensors, and pickles of tensors) without holding a whole file in memory.

Files are memory-mapped: a tensor's values are read from disk on first use.
"""

from __future__ import annotations

import ctypes
import mmap
import pickle
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.checkpoint_files import damaged

TRAINING_PREFIXES = ("diffusion.", "diffusion_ema.")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Returns all tensors of a file by key, on the CPU. Pickles are loaded with `weights_only`.

    Raises CheckpointError if the file is missing, corrupt, truncated, or a raw training checkpoint.
    """
    weights = _read_pickle(path) if path.suffix == ".ckpt" else _read_safetensors(path)
    if any(key.startswith(TRAINING_PREFIXES) for key in weights):
        raise CheckpointError(f"{path} is a raw training checkpoint; export it first, then serve the exported file")
    return weights


def release_pages(path: Path, tensors: Iterable[Tensor]) -> None:
    """Free the memory of `tensors`, which `read_weights(path)` returned. Their next use reads the file again.

    `tensors` must not be copies. Works only on Linux and for files that can be memory-mapped; otherwise does nothing.
    """
    if sys.platform != "linux" or not _is_mapped(path):
        return
    libc = ctypes.CDLL(None)
    for tensor in tensors:
        # Only whole pages, because the first and the last page may hold other data.
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if size > 0:
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


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
