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
# Not integers, nor types that need a scale for each block of values.
_DTYPES = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
    )
}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Returns all tensors of a file by key, on the CPU. Pickles are loaded with `weights_only`.

    Raises CheckpointError if the file is missing, corrupt, truncated, or a raw training checkpoint.
    """
    weights = _read_pickle(path) if path.suffix == ".ckpt" else _read_safetensors(path)
    if any(key.startswith(TRAINING_PREFIXES) for key in weights):
        raise CheckpointError(
            f"{path} is a raw training checkpoint; export it first with unwrap_model.py of stable-audio-tools"
        )
    return weights


def require_floats(path: Path, key: str, *, weight: Tensor) -> None:
    """Raise CheckpointError if `weight`, which is in the file under `key`, has a dtype whose values are no weights."""
    if weight.dtype not in _DTYPES:
        allowed = ", ".join(_DTYPES.values())
        raise CheckpointError(f"{path}: {key} holds {weight.dtype}, not floating-point numbers ({allowed})")


def release_pages(tensors: Iterable[Tensor]) -> None:
    """Free the memory of `tensors`, which `read_weights` returned for a file that `is_mapped`. Works only on Linux.

    The next use of a tensor reads the file again. The values of copies would be lost.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for tensor in tensors:
        if not tensor.is_contiguous():
            continue  # the values of an expanded tensor take less memory than `nbytes`
        # Only whole pages, because the first and the last page may hold other data.
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if size > 0:
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def is_mapped(path: Path) -> bool:
    """Whether a file can be memory-mapped.

    Pickles from before torch 1.6 cannot, because they are not zip archives, nor can those of a machine with another
    byte order. Raises CheckpointError for compressed archives, which torch would map as if they were not compressed.
    """
    if path.suffix != ".ckpt":
        return True
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise CheckpointError(f"{path} is a compressed archive; save it again with torch.save")
        orders = [member for member in members if member.filename.endswith("/byteorder") and member.file_size < 16]
        return all(archive.read(order) == sys.byteorder.encode() for order in orders)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is corrupt or holds more than tensors, which is not loaded for safety; convert it to safetensors"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes can raise any error
        raise damaged(path, error) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(key, str) and _is_dense(state[key]) for key in state):
        raise CheckpointError(f"{path} does not hold a state_dict of tensors")
    return dict(state)


def _is_dense(value: object) -> bool:
    """Whether a value is an ordinary tensor: with values, not sparse and not nested."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
    )
