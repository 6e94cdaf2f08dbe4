from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.models import official_config
from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.sao.config import INERT_KEYS
from stable_audio_serve.models.sao.network_config import OobleckConfig, parse_oobleck
from stable_audio_serve.models.sao.oobleck import NormedConv, OobleckAutoencoder
from tests.goldens import load_open_goldens
from tests.models.sao.tiny import TINY, load_autoencoder, model_values

TOLERANCE = 2e-5
HALO = 16


def parse(values: dict[str, Any]) -> OobleckConfig:
    model = ConfigReader({"pretransform": values}, path="model")
    parsed = parse_oobleck(model)
    model.refuse_unread(inert=INERT_KEYS)
    return parsed


@pytest.mark.parametrize("name", TINY)
def test_encoder_matches_the_reference_stage_by_stage(name: str) -> None:
    tensors, encoder = load_open_goldens(name).tensors, load_autoencoder(name).encoder
    first = encoder.layers[0](tensors["ae/wave"])
    torch.testing.assert_close(first, tensors["ae/encoder_stage0"], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(encoder.layers[1](first), tensors["ae/encoder_stage1"], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(encoder(tensors["ae/wave"]), tensors["ae/encoder_out"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", TINY)
def test_the_bottleneck_draws_as_the_reference_does(name: str) -> None:
    tensors = load_open_goldens(name).tensors
    noise = torch.randn(2, 8, 10, generator=torch.Generator().manual_seed(21))
    latents = load_autoencoder(name).encode(tensors["ae/wave"], noise)
    torch.testing.assert_close(latents, tensors["ae/encode_seed21"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(("source", "key"), [("ae/z", "ae/decode"), ("ae/long_z", "ae/long_decode")])
def test_decode_matches_the_reference(name: str, source: str, key: str) -> None:
    tensors = load_open_goldens(name).tensors
    torch.testing.assert_close(load_autoencoder(name).decode(tensors[source]), tensors[key], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", TINY)
def test_kernels_match_the_reference(name: str) -> None:
    tensors, net = load_open_goldens(name).tensors, load_autoencoder(name)
    for module, key in (
        (net.encoder.layers[0], "ae/resolved_first_conv"),
        (net.decoder.layers[1].layers[1], "ae/resolved_first_upsample"),
    ):
        assert isinstance(module, NormedConv)
        torch.testing.assert_close(module.kernel(), tensors[key], rtol=0, atol=TOLERANCE)


def test_a_window_with_a_halo_decodes_like_the_whole() -> None:
    tensors, net = load_open_goldens("tiny-1.0").tensors, load_autoencoder("tiny-1.0")
    window = net.decode(tensors["ae/long_z"][..., 20:76])
    hop = net.config.hop
    middle = window[..., HALO * hop : -HALO * hop]
    expected = tensors["ae/long_decode"][..., (20 + HALO) * hop : (76 - HALO) * hop]
    torch.testing.assert_close(middle, expected, rtol=0, atol=TOLERANCE)


def test_scale_divides_latents_and_multiplies_them_back() -> None:
    tensors, plain = load_open_goldens("tiny-1.0").tensors, load_autoencoder("tiny-1.0")
    scaled = OobleckAutoencoder(parse(model_values("tiny-1.0")["pretransform"] | {"scale": 2.0}))
    scaled.resolve()  # replaces parameters as in `plain`, so that both have parameters with the same names
    scaled.load_state_dict(plain.state_dict())
    scaled.resolve()
    noise = torch.zeros(2, 8, 10)
    with torch.no_grad():
        latents = scaled.encode(tensors["ae/wave"], noise)
        torch.testing.assert_close(2.0 * latents, plain.encode(tensors["ae/wave"], noise))
        torch.testing.assert_close(scaled.decode(latents), plain.decode(2.0 * latents))


def test_published_shape_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        net = OobleckAutoencoder(parse(official_config("stable-audio-open-1.0")["model"]["pretransform"]))
    assert net.config.hop == 2048
    assert sum(parameter.numel() for parameter in net.parameters()) / 1e6 == pytest.approx(156.1, abs=0.1)


@pytest.mark.parametrize(
    ("key", "path", "value"),
    [
        ("model.pretransform.model_half", ("model_half",), True),
        ("model.pretransform.invented", ("invented",), 1),
        ("model.pretransform.config.bottleneck.type", ("config", "bottleneck", "type"), "tanh"),
        ("model.pretransform.config.downsampling_ratio", ("config", "downsampling_ratio"), 32),
        ("model.pretransform.config.latent_dim", ("config", "latent_dim"), None),
        ("model.pretransform.config.encoder.type", ("config", "encoder", "type"), "dac"),
        ("model.pretransform.config.encoder.config.use_snake", ("config", "encoder", "config", "use_snake"), False),
        ("model.pretransform.config.encoder.config.latent_dim", ("config", "encoder", "config", "latent_dim"), 8),
        ("model.pretransform.config.encoder.config.c_mults", ("config", "encoder", "config", "c_mults"), [1, 2, 10**5]),
        ("model.pretransform.config.encoder.config.strides", ("config", "encoder", "config", "strides"), [2, 32]),
        ("model.pretransform.config.encoder.config.strides", ("config", "encoder", "config", "strides"), [64, 1, 1]),
        ("model.pretransform.config.decoder.config.strides", ("config", "decoder", "config", "strides"), [8, 4, 2]),
        ("model.pretransform.config.decoder.config.soft_clip", ("config", "decoder", "config", "soft_clip"), True),
        ("model.pretransform.config.decoder.config.channels", ("config", "decoder", "config", "channels"), 16),
    ],
)
def test_a_config_for_another_network_is_refused_by_key(key: str, path: tuple[str, ...], value: Any) -> None:
    values = model_values("tiny-1.0")["pretransform"]
    section = values
    for name in path[:-1]:
        section = section[name]
    section[path[-1]] = value
    with pytest.raises(CheckpointError) as caught:
        parse(values)
    assert f"{key} " in str(caught.value)
