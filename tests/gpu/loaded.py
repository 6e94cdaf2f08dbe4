"""Load reference checkpoints to a device, with the denoiser in a given dtype. Each is loaded at most once."""

from __future__ import annotations

from functools import cache

import torch

from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.registry import resolve_entry
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.models.weights import cast_network
from tests.goldens import load_goldens


@cache
def load_on(device: torch.device, name: str, dtype: torch.dtype = torch.float32) -> Sa3Model:
    entry, own = resolve_entry(name, path=str(load_goldens(name).folder)), dtype if device.type == "cuda" else None
    model = load_model(entry, device=device, dtype=own, decode_precision="float32")
    assert isinstance(model, Sa3Model)
    if device.type != "cuda":
        cast_network(model.denoiser, dtype)  # `load_model` would refuse some dtypes on this device
    return model
