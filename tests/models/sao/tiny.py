"""The networks of the tiny Stable Audio Open checkpoints. Each network is loaded once."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from torch import Tensor

from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.sao.denoiser import Denoiser
from stable_audio_serve.models.sao.network_config import parse_denoiser, parse_oobleck
from stable_audio_serve.models.sao.oobleck import OobleckAutoencoder
from stable_audio_serve.models.weight_files import read_weights
from stable_audio_serve.models.weights import assign_weights
from tests.goldens import load_open_goldens

TINY = ("tiny-1.0", "tiny-small")
DENOISER, AUTOENCODER = "model.model.", "pretransform.model."


def model_values(name: str) -> dict[str, Any]:
    """Returns a copy of the config's `model` section."""
    file = load_open_goldens(name).folder / "model_config.json"
    values: dict[str, Any] = json.loads(file.read_text())["model"]
    return values


def weights_of(name: str, prefix: str) -> dict[str, Tensor]:
    """Returns the checkpoint's tensors whose keys start with `prefix`, by full key."""
    weights = read_weights(load_open_goldens(name).folder / "model.safetensors")
    return {key: value for key, value in weights.items() if key.startswith(prefix)}


@cache
def load_denoiser(name: str) -> Denoiser:
    net = Denoiser(parse_denoiser(ConfigReader(model_values(name)["diffusion"], path="model.diffusion")))
    assign_weights({DENOISER: net}, weights_of(name, DENOISER), source=load_open_goldens(name).folder)
    return net


@cache
def load_autoencoder(name: str) -> OobleckAutoencoder:
    net = OobleckAutoencoder(parse_oobleck(ConfigReader(model_values(name), path="model")))
    assign_weights({AUTOENCODER: net}, weights_of(name, AUTOENCODER), source=load_open_goldens(name).folder)
    net.resolve()
    return net
