from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.sao.config import SaoConfig, parse_config
from tests.goldens import load_open_goldens
from tests.models.sao.tiny import TINY


def tiny(name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((load_open_goldens(name).folder / "model_config.json").read_text())
    return values


def parse(values: dict[str, Any]) -> SaoConfig:
    return parse_config(ConfigReader(values))


def changed(values: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    values = copy.deepcopy(values)
    section: Any = values
    for name in path[:-1]:
        section = section[name]
    section[path[-1]] = value
    return values


def test_configs_of_the_two_published_models() -> None:
    one, small = (parse(tiny(name)) for name in TINY)
    assert (one.objective, small.objective) == ("v", "rf_denoiser")
    assert (one.window_frames, small.window_frames) == (743, 186)
    assert [number.id for number in one.numbers] == ["seconds_start", "seconds_total"]
    assert one.context_ids == ("prompt", "seconds_start", "seconds_total")
    assert (one.prompt.max_length, small.prompt.max_length) == (24, 16)
    assert (one.shift, small.shift) == (None, {"min_length": 256, "max_length": 4096})
    assert (one.denoiser.projects_context, small.denoiser.projects_context) == (False, True)


def test_defaults_of_the_text_conditioner() -> None:
    values = changed(tiny("tiny-1.0"), ("model", "conditioning", "configs", 0, "config"), {})
    assert parse(values).prompt.max_length == 128


def test_training_keys_in_the_config_are_accepted() -> None:
    values = tiny("tiny-1.0") | {"training": {"learning_rate": 1e-4, "demo": {}}}
    assert parse(values) == parse(tiny("tiny-1.0"))


CONDITIONING, DIFFUSION = ("model", "conditioning"), ("model", "diffusion")
AUTOENCODER = ("model", "pretransform", "config")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((*DIFFUSION, "config", "attn_kwargs"), {"differential": False, "feat_scale": False}),
        ((*DIFFUSION, "config", "ff_kwargs"), {"conv_kernel_size": 3, "glu": True}),
        ((*DIFFUSION, "config", "norm_kwargs"), {"bias": True, "fix_scale": True, "force_fp32": True}),
        ((*DIFFUSION, "config", "final_cross_attn_ix"), -1),
        ((*DIFFUSION, "config", "add_rope"), False),
        ((*CONDITIONING, "pre_encoded_keys"), []),
        ((*AUTOENCODER, "in_channels"), 2),
        ((*AUTOENCODER, "out_channels"), 2),
        ((*AUTOENCODER, "decoder", "soft_clip"), False),
        ((*AUTOENCODER, "bottleneck", "config"), {}),
    ],
)
def test_keys_that_ask_for_the_same_network_are_accepted(path: tuple[str | int, ...], value: Any) -> None:
    assert parse(changed(tiny("tiny-1.0"), path, value)) == parse(tiny("tiny-1.0"))


@pytest.mark.parametrize(
    ("key", "path", "value"),
    [
        ("invented", ("invented",), 1),
        ("model_type", ("model_type",), "diffusion_uncond"),
        ("sample_size", ("sample_size",), 63),
        ("audio_channels", ("audio_channels",), 1),
        ("model.invented", ("model", "invented"), 1),
        ("model.io_channels", ("model", "io_channels"), 64),
        ("model.diffusion.mask_padding_attention", (*DIFFUSION, "mask_padding_attention"), True),
        ("model.diffusion.diffusion_objective", (*DIFFUSION, "diffusion_objective"), "eps"),
        ("model.diffusion.type", (*DIFFUSION, "type"), "adp_cfg_1d"),
        ("model.diffusion.prepend_cond_ids", (*DIFFUSION, "prepend_cond_ids"), ["prompt"]),
        ("model.diffusion.cross_attention_cond_ids", (*DIFFUSION, "cross_attention_cond_ids"), ["melody"]),
        ("model.diffusion.global_cond_ids", (*DIFFUSION, "global_cond_ids"), ["prompt"]),
        ("model.diffusion.config.global_cond_dim", (*DIFFUSION, "config", "global_cond_dim"), 64),
        ("model.conditioning.default_keys", (*CONDITIONING, "default_keys"), {"seconds_start": "x"}),
        ("model.conditioning.pre_encoded_keys", (*CONDITIONING, "pre_encoded_keys"), ["prompt"]),
        ("model.diffusion.config.final_cross_attn_ix", (*DIFFUSION, "config", "final_cross_attn_ix"), 0),
        ("model.diffusion.config.attn_kwargs.feat_scale", (*DIFFUSION, "config", "attn_kwargs"), {"feat_scale": True}),
        ("model.pretransform.config.in_channels", (*AUTOENCODER, "in_channels"), 1),
        ("model.pretransform.config.decoder.soft_clip", (*AUTOENCODER, "decoder", "soft_clip"), True),
        ("model.conditioning.configs", (*CONDITIONING, "configs"), []),
        ("model.conditioning.configs[0].type", (*CONDITIONING, "configs", 0, "type"), "clap_text"),
        ("model.conditioning.configs[0].config.invented", (*CONDITIONING, "configs", 0, "config", "invented"), 1),
        ("model.conditioning.configs[1].config.max_val", (*CONDITIONING, "configs", 1, "config", "max_val"), 0),
        ("model.conditioning.configs[1].id", (*CONDITIONING, "configs", 1, "id"), "bpm"),
    ],
)
def test_a_config_for_another_model_is_refused_by_key(key: str, path: tuple[str | int, ...], value: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(changed(tiny("tiny-1.0"), path, value))
    assert f" {key} " in str(caught.value)
