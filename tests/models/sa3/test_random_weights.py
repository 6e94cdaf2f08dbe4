"""The networks of the official models have the published numbers of tensors and parameters. No memory is used."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.models import build_random_model, official_config
from stable_audio_serve.models.sa3.autoencoder import AudioAutoencoder
from tests.parameters import slow

PUBLISHED = {
    "small-sfx": ((438, 459_130_896), (244, 108_244_721), 685, 1292),
    "medium": ((522, 1_453_170_192), (472, 852_127_457), 997, 4096),
}


def size(*modules: nn.Module) -> tuple[int, int]:
    states = [module.state_dict() for module in modules]
    return sum(map(len, states)), sum(value.numel() for state in states for value in state.values())


@pytest.mark.parametrize("name", [slow(name) if name == "small-sfx" else name for name in PUBLISHED])
def test_official_shapes(name: str) -> None:
    denoiser, autoencoder, total, frames = PUBLISHED[name]
    model = build_random_model(name, device="meta", dtype=torch.float16)
    conditioners = size(model.prompt, *model.numbers.values())
    assert size(model.denoiser) == denoiser
    with torch.device("meta"):
        # Built again, because loading changes the parameters. The published numbers count the parameters in the file.
        assert size(AudioAutoencoder(model.config.autoencoder)) == autoencoder
    assert conditioners == (3, 198_144)
    assert denoiser[0] + autoencoder[0] + conditioners[0] == total
    assert size(model.text.encoder) == (134, 281_580_288)
    assert model.spec.max_frames == frames
    assert model.spec.card.max_duration_s == (120.0 if name.startswith("small") else 380.0)
    assert model.denoiser.dtype == torch.float16


def test_seven_of_twelve_decoder_layers_use_the_sine() -> None:
    model = build_random_model("medium", device="meta", dtype=torch.float16)
    layers = model.autoencoder.decoder.layers["3"].transformers
    names = [layer.ff.ff[0].activation.__name__ for layer in layers]
    assert names == ["silu"] * 5 + ["sine"] * 7


@pytest.mark.parametrize(("name", "samples"), [("small-sfx", 5_292_032), ("small-music-base", 5_324_800)])
def test_official_windows(name: str, samples: int) -> None:
    assert official_config(name)["sample_size"] == samples
