"""What the conditioners of the model families have in common: they embed prompts and numbers as vectors, in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stable_audio_serve.models.config_reader import MAX_TOKENS, ConfigReader

# Ids of number conditioners for which a request has a value. Other ids are refused.
NUMBER_IDS = ("seconds_start", "seconds_total")


@dataclass(frozen=True, slots=True)
class PromptConfig:
    """The configuration of the conditioner that embeds prompts."""

    id: str
    width: int
    max_length: int
    project_out: bool


@dataclass(frozen=True, slots=True)
class NumberConfig:
    """The configuration of a conditioner that clamps a number to `minimum`..`maximum` and embeds it as a vector.

    `features` is the number of Fourier features from which the vector is computed.
    """

    id: str
    width: int
    minimum: float
    maximum: float
    features: int


@dataclass(frozen=True, slots=True)
class ConditionersConfig:
    """The configuration of the conditioners of a network.

    `context_ids` and `global_ids` have ids of conditioners, in the order in which their outputs are concatenated.
    """

    prompt: PromptConfig
    numbers: tuple[NumberConfig, ...]
    context_ids: tuple[str, ...]
    global_ids: tuple[str, ...]


def parse_prompt(item: ConfigReader, *, width: int) -> PromptConfig:
    """Parse an entry of `model.conditioning.configs`. Raises CheckpointError naming the key that cannot be used."""
    config = item.section("config", optional=True)
    return PromptConfig(
        id=item.text("id"),
        width=width,
        max_length=config.integer("max_length", default=128, at_most=MAX_TOKENS),
        project_out=config.flag("project_out", default=False),
    )


def parse_number(item: ConfigReader, *, width: int, features: int) -> NumberConfig:
    """Parse an entry of `model.conditioning.configs`. Raises CheckpointError naming the key that cannot be used."""
    config = item.section("config", optional=True)
    minimum, maximum = config.number("min_val", default=0), config.number("max_val", default=1)
    if maximum <= minimum:
        raise config.unusable("max_val", f"above min_val ({minimum:g})")
    return NumberConfig(item.choice("id", NUMBER_IDS), width, minimum, maximum, features)


class PromptConditioner(nn.Module):
    """Converts a text encoder's hidden states to conditioning tokens. Padding has a learned vector or is zero.

    If the hidden states do not have the width of the tokens, a linear layer projects them.
    """

    padding_embedding: Tensor | None

    def __init__(self, config: PromptConfig, *, encoder_width: int, learns_padding: bool) -> None:
        super().__init__()
        padding = nn.Parameter(torch.zeros(config.width)) if learns_padding else None
        self.register_parameter("padding_embedding", padding)
        projects = config.project_out or encoder_width != config.width
        self.proj_out = nn.Linear(encoder_width, config.width) if projects else nn.Identity()

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Returns tokens (batch, tokens, width) float32.

        `hidden` is (batch, tokens, encoder width). `mask` (batch, tokens) is true for real tokens.
        """
        padding = 0.0 if self.padding_embedding is None else self.padding_embedding
        # `where` instead of multiplication with the mask: the hidden states of padding can have any value, even NaN.
        return torch.where(mask[..., None], self.proj_out(hidden), padding)


class NumberConditioner(nn.Module):
    """Clamps a number to its range and embeds it as one vector. Names of submodules match keys of checkpoints.

    `features` maps numbers (batch,) in 0..1 to `config.features` Fourier features.
    """

    def __init__(self, config: NumberConfig, features: nn.Module) -> None:
        super().__init__()
        self.config = config
        embedding = nn.Sequential(features, nn.Linear(config.features, config.width))
        self.embedder = nn.ModuleDict({"embedding": embedding})

    def forward(self, values: Tensor) -> Tensor:
        """Returns embeddings (batch, width) float32 of numbers (batch,) float32."""
        low, high = self.config.minimum, self.config.maximum
        return self.embedder["embedding"]((values.clamp(low, high) - low) / (high - low))
