"""The halo (number of extra frames on each side of a window) is exactly the reach of the autoencoder's convolutions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.models import official_config
from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.sao.config import parse_config
from stable_audio_serve.models.sao.network_config import OobleckConfig
from stable_audio_serve.models.sao.oobleck import OobleckAutoencoder
from stable_audio_serve.models.windows import halo_windows
from tests.models.sao.tiny import TINY, load_autoencoder

SMALL = load_autoencoder("tiny-1.0").config
SHAPES = [
    SMALL,
    replace(SMALL, strides=(2, 2, 2)),
    replace(SMALL, strides=(8, 4, 2)),
    replace(SMALL, strides=(2, 4), widths=(4, 4, 8)),
    replace(SMALL, strides=(6, 10), widths=(4, 4, 8)),
    replace(SMALL, strides=(2, 4, 4, 8, 8), widths=(2, 2, 2, 2, 2, 2)),
]
MIDDLE, FRAMES = 40, 81


def make_autoencoder(config: OobleckConfig) -> OobleckAutoencoder:
    """Returns an autoencoder in float64 whose weights are positive, so that every input influences the output."""
    torch.manual_seed(0)
    net = OobleckAutoencoder(config).double()
    for name, parameter in net.named_parameters():
        parameter.data = torch.rand_like(parameter) * 0.5 + (0.1 if "alpha" not in name and "beta" not in name else 0)
    return net


def reach(influence: torch.Tensor) -> int:
    """Returns the largest distance, in frames from the middle frame, at which `influence` is not zero."""
    (frames,) = influence.nonzero(as_tuple=True)
    return max(MIDDLE - int(frames.min()), int(frames.max()) - MIDDLE)


@pytest.mark.parametrize("config", SHAPES, ids=lambda config: "x".join(map(str, config.strides)))
def test_the_decoders_halo_equals_the_reach_of_gradients(config: OobleckConfig) -> None:
    latents = torch.randn(1, config.latent_channels, FRAMES, dtype=torch.float64, requires_grad=True)
    audio = make_autoencoder(config).decode(latents)
    frame = audio[..., MIDDLE * config.hop : (MIDDLE + 1) * config.hop]
    (gradient,) = torch.autograd.grad(frame.square().sum(), latents)
    assert reach(gradient[0].abs().sum(0)) == config.decoder_halo_latents


@pytest.mark.parametrize("config", SHAPES, ids=lambda config: "x".join(map(str, config.strides)))
def test_the_encoders_halo_equals_the_reach_of_gradients(config: OobleckConfig) -> None:
    audio = torch.randn(1, config.channels, FRAMES * config.hop, dtype=torch.float64, requires_grad=True)
    codes = make_autoencoder(config).encoder(audio)
    (gradient,) = torch.autograd.grad(codes[..., MIDDLE].square().sum(), audio)
    by_frame = gradient[0].abs().sum(0).reshape(FRAMES, config.hop).sum(1)
    assert reach(by_frame) == config.encoder_halo_latents


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("kept", [7, 16])
def test_windows_with_a_halo_join_to_the_whole(name: str, kept: int) -> None:
    net = load_autoencoder(name)
    hop, halo = net.config.hop, max(net.config.decoder_halo_latents, net.config.encoder_halo_latents)
    audio = torch.randn(1, 2, 60 * hop, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(1, 8, 60, generator=torch.Generator().manual_seed(4))
    latents, decoded = torch.zeros(1, 8, 60), torch.zeros(1, 2, 60 * hop)
    for span in halo_windows(60, halo=halo, kept=kept):
        coded = net.encode(audio[..., span.start * hop : span.stop * hop], noise[..., span.start : span.stop])
        latents[..., span.keep_start : span.keep_stop] = coded[..., span.keep_start - span.start :][
            ..., : span.keep_stop - span.keep_start
        ]
    torch.testing.assert_close(latents, net.encode(audio, noise), rtol=0, atol=1e-5)
    for span in halo_windows(60, halo=halo, kept=kept):
        window = net.decode(latents[..., span.start : span.stop])
        first, length = (span.keep_start - span.start) * hop, (span.keep_stop - span.keep_start) * hop
        decoded[..., span.keep_start * hop : span.keep_stop * hop] = window[..., first : first + length]
    torch.testing.assert_close(decoded, net.decode(latents), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["stable-audio-open-1.0", "stable-audio-open-small"])
def test_published_decoders_see_ten_latents_to_each_side(name: str) -> None:
    assert parse_config(ConfigReader(official_config(name))).autoencoder.decoder_halo_latents == 10
