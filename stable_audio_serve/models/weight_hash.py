"""Computes a hash that identifies a checkpoint: SHA-256 over every byte of the files that affect the generated audio.

File sizes, dates or samples of the bytes would not show that a tensor was replaced by another tensor of the same shape.
Hashing runs at the speed of SHA-256 (0.5 to 2 GB/s per core).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.checkpoint_files import damaged, find_weights
from stable_audio_serve.models.config_reader import CONFIG_FILE

_ENCODER_SUFFIXES = frozenset({".json", ".safetensors", ".model", ".ckpt", ".txt"})
_SHA256 = re.compile(r"[0-9a-f]{64}")


def hash_weights(folder: Path, text_encoder: Path) -> str:
    """Returns 64 hexadecimal digits: SHA-256 of the names and digests of config, weights and text encoder.

    In the hub's cache, the name of a large file is its SHA-256. Raises CheckpointError if the content of such a file
    does not match its name, or if a file cannot be read.
    """
    whole = hashlib.sha256()
    for name, path in _files(folder, text_encoder):
        whole.update(f"{name}\0{_digest(path)}\0".encode())
    return whole.hexdigest()


def _files(folder: Path, text_encoder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name, path) of every file to hash. The name does not depend on where the checkpoint is stored."""
    yield "config", folder / CONFIG_FILE
    yield "weights", find_weights(folder)
    for path in sorted(text_encoder.iterdir()):
        if path.suffix in _ENCODER_SUFFIXES and path.is_file():
            yield f"text encoder {path.name}", path


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        expected = path.resolve().name
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if path.is_symlink() and _SHA256.fullmatch(expected) and found != expected:
        raise damaged(path, ValueError("its bytes are not those that the hub listed"))
    return found
