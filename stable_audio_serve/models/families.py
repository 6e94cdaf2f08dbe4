"""Loads a registry entry: finds or downloads its files, then loads the family. Registers every part by importing it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.models.download import download_entry
from stable_audio_serve.models.oscillator import parts as oscillator_parts
from stable_audio_serve.models.oscillator import timeline
from stable_audio_serve.models.protocol import DiffusionModel
from stable_audio_serve.models.registry import SA3_FAMILY, ModelEntry, describe_entry
from stable_audio_serve.models.sa3.build import load_sa3
from stable_audio_serve.models.weights import resolve_dtype

_LOADERS = {SA3_FAMILY: load_sa3}
_REGISTERED = (oscillator_parts, timeline)  # imported so that checkpoints may name the types they register


def load_model(
    entry: ModelEntry,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    token: str | None = None,
) -> DiffusionModel:
    """Load `entry` onto `device`; `dtype` is the denoiser's precision on CUDA (float16 by default).

    Takes seconds to minutes; downloads missing files. Raises CheckpointError with one sentence that says what to do,
    ConfigError for a device or dtype that cannot be used.
    """
    target = resolve_device(device)
    loader = _LOADERS.get(entry.card.family)
    if loader is None:
        raise ConfigError(f"models: the family {entry.card.family!r} is not supported", field="models")
    folder = Path(entry.folder) if entry.folder is not None else download_entry(entry, token=token)
    card = describe_entry(replace(entry, folder=str(folder))).card
    if entry.folder is None:  # an ingress may have no copy of it, and has told clients these
        card = replace(card, default_steps=entry.card.default_steps, default_cfg_scale=entry.card.default_cfg_scale)
    return loader(card, folder, device=target, dtype=resolve_dtype(target, dtype))


def resolve_device(device: str | torch.device) -> torch.device:
    """Returns the device as torch names it. Raises ConfigError when this machine cannot use it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {str(device)!r} cannot be used here: {reason}", field="device") from error
