"""The networks of Stable Audio Open have exactly the tensors of the published checkpoints, by name and shape."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import nn

from benchmarks.models import official_config
from stable_audio_serve.models.conditioners import NumberConditioner, PromptConditioner
from stable_audio_serve.models.config_reader import ConfigReader, read_config
from stable_audio_serve.models.sao.conditioners import LearnedFrequencies
from stable_audio_serve.models.sao.config import SaoConfig, parse_config
from stable_audio_serve.models.sao.denoiser import Denoiser
from stable_audio_serve.models.sao.oobleck import OobleckAutoencoder
from stable_audio_serve.models.weights import load_weights
from tests.goldens import load_open_goldens
from tests.models.sao.tiny import AUTOENCODER, DENOISER, TINY


def make_parts(config: SaoConfig, *, encoder_width: int) -> dict[str, nn.Module]:
    conditioners: dict[str, nn.Module] = {
        f"conditioner.conditioners.{number.id}.": NumberConditioner(number, LearnedFrequencies())
        for number in config.numbers
    }
    prompt = {
        "conditioner.conditioners.prompt.": PromptConditioner(
            config.prompt, encoder_width=encoder_width, learns_padding=False
        )
    }
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


class Published(NamedTuple):
    """The properties in which published models differ. `keys` is the width of keys and values in cross-attention."""

    name: str
    width: int
    depth: int
    head: int
    keys: int
    normed_heads: bool
    numbers: dict[str, int]
    num_tensors: int
    num_weights: int
    frames: int


V1 = Published(
    "stable-audio-open-1.0",
    1536,
    24,
    64,
    768,
    False,
    {"seconds_start": 512, "seconds_total": 512},
    745,
    1_213_448_210,
    1024,
)
SMALL = Published("stable-audio-open-small", 1024, 16, 128, 1024, True, {"seconds_total": 256}, 750, 497_239_458, 256)
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def published_shapes(model: Published) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor in a published file, by key."""
    return dict([*_denoiser(model), *_numbers(model), *_coder("encoder"), *_coder("decoder")])


def _denoiser(model: Published) -> Shapes:
    w, dk, g = model.width, model.keys, 768 * len(model.numbers)
    yield DENOISER + "timestep_features.weight", (128, 1)
    for part, width_in, width in (("timestep", 256, w), ("cond", 768, dk), ("global", g, w)):
        yield f"{DENOISER}to_{part}_embed.0.weight", (width, width_in)
        yield f"{DENOISER}to_{part}_embed.2.weight", (width, width)
    yield DENOISER + "to_timestep_embed.0.bias", (w,)
    yield DENOISER + "to_timestep_embed.2.bias", (w,)
    yield DENOISER + "preprocess_conv.weight", (64, 64, 1)
    yield DENOISER + "postprocess_conv.weight", (64, 64, 1)
    yield DENOISER + "transformer.project_in.weight", (w, 64)
    yield DENOISER + "transformer.project_out.weight", (64, w)
    yield DENOISER + "transformer.rotary_pos_emb.inv_freq", (model.head // 4,)
    for number in range(model.depth):
        layer = f"{DENOISER}transformer.layers.{number}."
        for norm in ("pre_norm", "cross_attend_norm", "ff_norm"):
            yield f"{layer}{norm}.gamma", (w,)
            yield f"{layer}{norm}.beta", (w,)
        yield layer + "self_attn.to_qkv.weight", (3 * w, w)
        yield layer + "self_attn.to_out.weight", (w, w)
        yield layer + "cross_attn.to_q.weight", (w, w)
        yield layer + "cross_attn.to_kv.weight", (2 * dk, dk)
        yield layer + "cross_attn.to_out.weight", (w, w)
        for attention in ("self_attn", "cross_attn") if model.normed_heads else ():
            for norm in ("q_norm", "k_norm"):
                yield f"{layer}{attention}.{norm}.weight", (model.head,)
                yield f"{layer}{attention}.{norm}.bias", (model.head,)
        yield layer + "ff.ff.0.proj.weight", (8 * w, w)
        yield layer + "ff.ff.0.proj.bias", (8 * w,)
        yield layer + "ff.ff.2.weight", (w, 4 * w)
        yield layer + "ff.ff.2.bias", (w,)


def _numbers(model: Published) -> Shapes:
    for number in model.numbers:
        embedding = f"conditioner.conditioners.{number}.embedder.embedding."
        yield embedding + "0.weights", (128,)
        yield embedding + "1.weight", (768, 257)
        yield embedding + "1.bias", (768,)


def _coder(name: str) -> Shapes:
    """Yields the keys and shapes of the autoencoder's encoder or decoder (`name`), from its input to its output."""
    layers, encodes = f"{AUTOENCODER}{name}.layers.", name == "encoder"
    widths, strides = (128, 128, 256, 512, 1024, 2048), (2, 4, 4, 8, 8)
    if not encodes:
        widths, strides = widths[::-1], strides[::-1]
    yield from _conv(layers + "0", out=widths[0], into=2 if encodes else 64, kernel=7)
    for number, (width, after, stride) in enumerate(zip(widths, widths[1:], strides, strict=False), start=1):
        block = f"{layers}{number}.layers."
        units, snake, conv = (range(3), 3, 4) if encodes else (range(2, 5), 0, 1)
        for unit in units:
            yield from _unit(f"{block}{unit}.layers.", width=width if encodes else after)
        yield from _snake(f"{block}{snake}", width)
        yield from _conv(f"{block}{conv}", out=after, into=width, kernel=2 * stride, transposed=not encodes)
    yield from _snake(layers + "6", widths[-1])
    if encodes:
        yield from _conv(layers + "7", out=128, into=widths[-1], kernel=3)
    else:
        yield from _conv(layers + "7", out=2, into=widths[-1], kernel=7, bias=False)


def _unit(layers: str, *, width: int) -> Shapes:
    yield from _snake(layers + "0", width)
    yield from _conv(layers + "1", out=width, into=width, kernel=7)
    yield from _snake(layers + "2", width)
    yield from _conv(layers + "3", out=width, into=width, kernel=1)


def _snake(key: str, width: int) -> Shapes:
    yield key + ".alpha", (width,)
    yield key + ".beta", (width,)


def _conv(key: str, *, out: int, into: int, kernel: int, transposed: bool = False, bias: bool = True) -> Shapes:
    first, second = (into, out) if transposed else (out, into)
    yield key + ".weight_g", (first, 1, 1)
    yield key + ".weight_v", (first, second, kernel)
    if bias:
        yield key + ".bias", (out,)


@pytest.mark.parametrize("name", TINY)
def test_every_tensor_of_the_references_checkpoint_is_used(name: str) -> None:
    goldens = load_open_goldens(name)
    parts = make_parts(parse_config(read_config(goldens.folder)), encoder_width=64)
    expected = {key: tuple(shape) for key, (_, shape) in goldens.facts["state_dict"].items()}
    assert shapes_of(parts) == expected
    load_weights(parts, goldens.folder / "model.safetensors", device=torch.device("cpu"))


@pytest.mark.parametrize("model", [V1, SMALL], ids=["1.0", "small"])
def test_published_models_have_the_published_tensors(model: Published) -> None:
    config = parse_config(ConfigReader(official_config(model.name)))
    with torch.device("meta"):
        shapes = shapes_of(make_parts(config, encoder_width=768))
    expected = published_shapes(model)
    assert (len(expected), sum(map(math.prod, expected.values()))) == (model.num_tensors, model.num_weights)
    assert shapes == expected
    assert config.window_frames == model.frames
    assert {number.id: number.maximum for number in config.numbers} == model.numbers
