"""Conditioners without weights that compute features of every latent frame, built from a config by their `type`.

A family with local conditioning builds them through this registry. A module registers its type when it is imported;
`models/families.py` imports them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from stable_audio_serve.models.config_reader import ConfigReader


class FrameConditioner(Protocol):
    """Converts numbers of a request into features of its frames."""

    num_features: int

    def read_numbers(self, prompt: str) -> Mapping[str, float]:
        """Returns numbers read from a prompt, by name."""
        ...

    def features(self, num_frames: int, *, frame_s: float, numbers: Mapping[str, float]) -> Tensor:
        """Returns features (num_features, F) float32 on the CPU of frames that start at multiples of `frame_s`."""
        ...


FrameConditionerBuilder = Callable[[ConfigReader], FrameConditioner]

_BUILDERS: dict[str, FrameConditionerBuilder] = {}


def register_frame_conditioner(type_: str) -> Callable[[FrameConditionerBuilder], FrameConditionerBuilder]:
    """Register the decorated function as builder of `type_`; it receives the conditioner's `config` section."""

    def register(builder: FrameConditionerBuilder) -> FrameConditionerBuilder:
        _BUILDERS[type_] = builder
        return builder

    return register


def frame_conditioner_types() -> tuple[str, ...]:
    """Returns every registered type."""
    return tuple(_BUILDERS)


def build_frame_conditioner(item: ConfigReader) -> FrameConditioner:
    """Build `{type, config}` of a registered type. Raises CheckpointError naming a key that cannot be used."""
    return _BUILDERS[item.choice("type", frame_conditioner_types())](item.section("config"))
