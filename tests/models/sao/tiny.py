"""Load the networks of the tiny Stable Audio Open checkpoints. Each network is loaded at most once."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from torch import Tensor, nn

from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.sao.denoiser import Denoiser
from stable_audio_serve.models.sao.network_config import parse_denoiser, parse_oobleck
from stable_audio_serve.models.sao.oobleck import OobleckAutoencoder
from stable_audio_serve.models.weight_files import read_weights
from tests.goldens import load_open_goldens

TINY = ("tiny-1.0", "tiny-small")
DENOISER, AUTOENCODER = "model.model.", "pretransform.model."


def model_values(name: str) -> dict[str, Any]:
    """Returns a copy of the section `model` of the checkpoint's config."""
    file = load_open_goldens(name).folder / "model_config.json"
    values: dict[str, Any] = json.loads(file.read_text())["model"]
    return values


def weights_of(name: str, prefix: str) -> dict[str, Tensor]:
    """Returns those tensors of the checkpoint whose keys start with `prefix`. The keys keep the prefix."""
    weights = read_weights(load_open_goldens(name).folder / "model.safetensors")
    return {key: value for key, value in weights.items() if key.startswith(prefix)}


def assign(net: nn.Module, name: str, prefix: str) -> None:
    """Load the checkpoint's tensors whose keys start with `prefix` into the network."""
    state = {key.removeprefix(prefix): value.float() for key, value in weights_of(name, prefix).items()}
    net.load_state_dict(state, assign=True)
    net.eval().requires_grad_(False)


@cache
def load_denoiser(name: str) -> Denoiser:
    net = Denoiser(parse_denoiser(ConfigReader(model_values(name)["diffusion"], path="model.diffusion")))
    assign(net, name, DENOISER)
    return net


@cache
def load_autoencoder(name: str) -> OobleckAutoencoder:
    net = OobleckAutoencoder(parse_oobleck(ConfigReader(model_values(name), path="model")))
    assign(net, name, AUTOENCODER)
    net.resolve()
    return net
