"""Computes the size of a checkpoint's weights in memory from the shapes in its files, without reading the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from stable_audio_serve.models.checkpoint_files import encoder_weights, find_weights, is_open_family
from stable_audio_serve.models.config_reader import read_config
from stable_audio_serve.models.weight_files import read_weights

DENOISER_KEYS = "model.model."  # prefix of the denoiser's keys, the same in both model families
_UNUSED = ("decoder.", "lm_head.")  # keys that contain these texts do not belong to the text encoder
_OPEN_TEXT_BYTES = 2  # bytes per weight of a T5, which is loaded as float16 from files of any dtype

# The number of weights of the denoiser, and the bytes of all other networks, of each official model.
_SMALL, _MEDIUM = (459_130_880, 996_968_964), (1_453_170_176, 3_972_610_500)
_OFFICIAL: Mapping[str, tuple[int, int]] = {
    "small-sfx": _SMALL,
    "small-music": _SMALL,
    "medium": _MEDIUM,
    "small-sfx-base": _SMALL,
    "small-music-base": _SMALL,
    "medium-base": _MEDIUM,
    "stable-audio-open-1.0": (1_056_939_008, 845_154_624),
    "stable-audio-open-small": (340_928_512, 844_361_600),
}


def official_weight_bytes(name: str, *, dtype: torch.dtype) -> int | None:
    """Returns what `weight_bytes` returns for an official model; None for other names."""
    if name not in _OFFICIAL:
        return None
    num_weights, other_bytes = _OFFICIAL[name]
    return num_weights * dtype.itemsize + other_bytes


def weight_bytes(folder: Path, *, text_encoder: Path, dtype: torch.dtype) -> int:
    """Returns the memory in bytes of a checkpoint's networks and its text encoder, with the denoiser in `dtype`.

    Raises CheckpointError if a file is damaged.
    """
    networks = sum(
        tensor.numel() * (dtype.itemsize if key.startswith(DENOISER_KEYS) else torch.float32.itemsize)
        for key, tensor in read_weights(find_weights(folder)).items()
    )
    text_size = _OPEN_TEXT_BYTES if is_open_family(read_config(folder)) else None
    text = sum(
        tensor.numel() * (text_size or max(tensor.element_size(), torch.bfloat16.itemsize))  # float8 becomes bfloat16
        for path in encoder_weights(text_encoder)
        for key, tensor in read_weights(path).items()
        if not any(part in key for part in _UNUSED)
    )
    return networks + text
