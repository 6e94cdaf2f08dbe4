"""Conditioners without weights that tell the denoiser something of every latent frame, each known by its `type`.

A family that has local conditioning asks for them by type and knows none of them by name; whoever brings one registers
it, and `models/families.py` imports whoever does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from stable_audio_serve.models.config_reader import ConfigReader


class FrameConditioner(Protocol):
    """Numbers of a request in, features of its frames out."""

    num_features: int

    def read_numbers(self, prompt: str) -> Mapping[str, float]:
        """Numbers that it takes from a prompt, by name."""
        ...

    def features(self, num_frames: int, *, frame_s: float, numbers: Mapping[str, float]) -> Tensor:
        """Features (num_features, F) float32 on the CPU of frames that start at multiples of `frame_s`."""
        ...


FrameConditionerBuilder = Callable[[ConfigReader], FrameConditioner]

_BUILDERS: dict[str, FrameConditionerBuilder] = {}


def register_frame_conditioner(type_: str) -> Callable[[FrameConditionerBuilder], FrameConditionerBuilder]:
    """Make `type_` buildable; the decorated function gets the conditioner's own `config` section."""

    def register(builder: FrameConditionerBuilder) -> FrameConditionerBuilder:
        _BUILDERS[type_] = builder
        return builder

    return register


def frame_conditioner_types() -> tuple[str, ...]:
    """Every registered type."""
    return tuple(_BUILDERS)


def build_frame_conditioner(item: ConfigReader) -> FrameConditioner:
    """Build `{type, config}` of a registered type. Raises CheckpointError naming a key that cannot be used."""
    return _BUILDERS[item.choice("type", frame_conditioner_types())](item.section("config"))
