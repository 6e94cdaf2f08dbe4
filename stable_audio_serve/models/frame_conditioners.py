"""A registry of conditioners without weights. They compute features for every latent frame.

A checkpoint's config names a conditioner by its `type`. Model families with local (per-frame) conditioning build their
conditioners here. Importing a module registers the types that it defines; `models/families.py` imports all modules that
define conditioners.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from stable_audio_serve.models.config_reader import ConfigReader


class FrameConditioner(Protocol):
    """Computes features of a clip's latent frames from numbers such as its duration and tempo."""

    num_features: int

    def read_numbers(self, prompt: str) -> Mapping[str, float]:
        """Returns numbers that the prompt contains, such as a tempo, by name."""
        ...

    def features(self, num_frames: int, *, frame_s: float, numbers: Mapping[str, float]) -> Tensor:
        """Returns features (number of features, num_frames) float32, on the CPU. Frame i starts at i * `frame_s`."""
        ...


FrameConditionerBuilder = Callable[[ConfigReader], FrameConditioner]

_BUILDERS: dict[str, FrameConditionerBuilder] = {}


def register_frame_conditioner(type_: str) -> Callable[[FrameConditionerBuilder], FrameConditionerBuilder]:
    """Register the decorated function as the builder of the type `type_`.

    The function is called with the conditioner's `config` section.
    """

    def register(builder: FrameConditionerBuilder) -> FrameConditionerBuilder:
        _BUILDERS[type_] = builder
        return builder

    return register


def frame_conditioner_types() -> tuple[str, ...]:
    """Returns every registered type."""
    return tuple(_BUILDERS)


def build_frame_conditioner(item: ConfigReader) -> FrameConditioner:
    """Build the conditioner described by `item`, a section with the keys `type` (a registered type) and `config`.

    Raises CheckpointError naming a key that cannot be used.
    """
    return _BUILDERS[item.choice("type", frame_conditioner_types())](item.section("config"))
