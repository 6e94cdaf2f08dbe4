"""The engine's accelerated features on a device: the profile of a replica, and a trial of each feature alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from stable_audio_serve.core.settings import ModelSettings, Settings

# A feature's name, and a function that tries it alone on the device and returns the measured agreement with the plain
# path. The function raises if the feature fails or differs.
Feature = tuple[str, Callable[[], str]]


def chosen_profile(settings: Settings, device: torch.device) -> tuple[str, str]:
    """Return the profile of a replica on this device, and the reason."""
    if device.type != "cuda":
        return "plain", "no GPU"
    return "auto", "decided when the replica starts"


def accelerated_features(settings: Settings, model: ModelSettings, *, device: torch.device) -> Sequence[Feature]:
    """Return the features that can be tried alone with this model; none on a device without CUDA."""
    return ()
