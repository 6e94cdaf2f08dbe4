"""What a checkpoint of the family holds: the parts' names and shapes together are its tensors, none more, none less."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from stable_audio_serve.models.config_reader import ConfigReader, read_config
from stable_audio_serve.models.sao.conditioners import NumberConditioner, PromptConditioner
from stable_audio_serve.models.sao.config import SaoConfig, parse_config
from stable_audio_serve.models.sao.denoiser import Denoiser
from stable_audio_serve.models.sao.oobleck import OobleckAutoencoder
from stable_audio_serve.models.sao.random_weights import OPEN_1_0, OPEN_SMALL
from stable_audio_serve.models.weights import assign_weights, read_weights
from tests.goldens import load_open_goldens
from tests.models.sao.tiny import AUTOENCODER, DENOISER, TINY


def make_parts(config: SaoConfig, *, encoder_width: int) -> dict[str, nn.Module]:
    conditioners: dict[str, nn.Module] = {
        f"conditioner.conditioners.{number.id}.": NumberConditioner(number) for number in config.numbers
    }
    prompt = {"conditioner.conditioners.prompt.": PromptConditioner(config.prompt, encoder_width=encoder_width)}
    return {
        DENOISER: Denoiser(config.denoiser),
        AUTOENCODER: OobleckAutoencoder(config.autoencoder),
        **conditioners,
        **prompt,
    }


def shapes_of(parts: dict[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    return {
        prefix + key: tuple(value.shape) for prefix, part in parts.items() for key, value in part.state_dict().items()
    }


@pytest.mark.parametrize("name", TINY)
def test_every_tensor_of_the_reference_s_checkpoint_has_its_place(name: str) -> None:
    goldens = load_open_goldens(name)
    parts = make_parts(parse_config(read_config(goldens.folder)), encoder_width=64)
    expected = {key: tuple(shape) for key, (_, shape) in goldens.facts["state_dict"].items()}
    assert shapes_of(parts) == expected
    assign_weights(parts, read_weights(goldens.folder / "model.safetensors"), source=goldens.folder)


@pytest.mark.parametrize(
    ("values", "num_tensors", "num_numbers", "frames"),
    [(OPEN_1_0, 745, 1_213_448_210, 1024), (OPEN_SMALL, 750, 497_239_458, 256)],
    ids=["1.0", "small"],
)
def test_published_models_have_the_published_tensors(
    values: dict[str, Any], num_tensors: int, num_numbers: int, frames: int
) -> None:
    config = parse_config(ConfigReader(values))
    with torch.device("meta"):
        shapes = shapes_of(make_parts(config, encoder_width=768))
    assert len(shapes) == num_tensors
    assert sum(map(math.prod, shapes.values())) == num_numbers
    assert config.window_frames == frames
