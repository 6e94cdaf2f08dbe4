"""Reference checkpoints on a device, with the denoiser in a given precision, and the engine's interface to the device.

Each checkpoint is loaded at most once.
"""

from __future__ import annotations

import os
from functools import cache

import pytest
import torch

from stable_audio_serve.core.clock import SystemClock
from stable_audio_serve.engine.hardware.device import Device, open_device
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.registry import resolve_entry
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.models.weights import cast_network
from tests.goldens import SHARP, load_goldens
from tests.gpu.stand_in import open_honest

IS_STAND_IN = os.environ.get("STABLE_AUDIO_TEST_DEVICE") == "stand-in"
# Tests with this mark are skipped on the stand-in, because tests in other folders compare the same values on a CPU.
gpu_only = pytest.mark.skipif(IS_STAND_IN, reason="needs a GPU")
CHECKPOINTS = [SHARP[0], *(pytest.param(name, marks=gpu_only) for name in SHARP[1:])]


def open_for(device: torch.device) -> Device:
    """Returns the engine's interface to the device, or to its stand-in."""
    return open_honest(device) if IS_STAND_IN else open_device(device, clock=SystemClock())


@cache
def load_on(device: torch.device, name: str, dtype: torch.dtype = torch.float32) -> Sa3Model:
    entry, own = resolve_entry(name, path=str(load_goldens(name).folder)), dtype if device.type == "cuda" else None
    model = load_model(entry, device=device, dtype=own, decode_precision="float32")
    assert isinstance(model, Sa3Model)
    if device.type != "cuda":
        cast_network(model.denoiser, dtype)  # `load_model` would refuse some dtypes on this device
    return model
