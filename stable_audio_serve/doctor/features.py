"""The engine's accelerated features on a device: the profile of a replica, and a trial of each feature alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial

import torch

from stable_audio_serve.core.settings import ModelSettings, Settings
from stable_audio_serve.engine import Engine
from stable_audio_serve.engine.options import PLAIN, Features
from stable_audio_serve.serving.engines import load_engine

# A feature's name, and a function that tries the feature alone on the device. The function returns a message. It raises
# an error if the feature fails, or if its results differ from those of an engine without features (the plain path).
Feature = tuple[str, Callable[[], str]]


def chosen_profile(model: ModelSettings, device: torch.device) -> tuple[str, str]:
    """Return the profile that a replica of the model has on this device, and the reason for it."""
    if device.type != "cuda":
        return "plain", "no GPU"
    if model.engine.profile != "auto":
        return model.engine.profile, "the setting engine.profile"
    return "auto", "decided by the check when the replica starts; --features runs it now"


def accelerated_features(settings: Settings, model: ModelSettings, *, device: torch.device) -> Sequence[Feature]:
    """Return the features that can be tried alone with this model; none on a device without CUDA."""
    if device.type != "cuda":
        return ()

    def try_alone(feature: str) -> str:
        only = replace(PLAIN, **{feature: True})
        tried = model.engine.model_copy(
            update={"profile": "auto", "features": {each.name: getattr(only, each.name) for each in fields(Features)}}
        )
        engine = load_engine(settings, model.model_copy(update={"engine": tried}))
        asyncio.run(_start(engine))
        if engine.profile.features != only:
            raise ValueError(engine.profile.reason)
        return "agrees with the plain path"

    return [(each.name, partial(try_alone, each.name)) for each in fields(Features)]


async def _start(engine: Engine) -> None:
    """Start an engine, which checks its profile, and close it."""
    async with engine:
        pass
