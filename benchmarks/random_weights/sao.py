"""Builds models of the published sizes with random weights, for benchmarks and size checks.

Their output is noise. Therefore no model name of a server refers to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stable_audio_serve.core.catalog import DecodePrecision, ModelCard
from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.precision import resolve_decode_precision
from stable_audio_serve.models.registry import open_card
from stable_audio_serve.models.sao.build import build_components, build_spec
from stable_audio_serve.models.sao.config import parse_config
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.models.text_encoder import TextEncoder
from stable_audio_serve.models.weights import cast_network, require_exact_float32

_CODER = {"channels": 128, "c_mults": [1, 2, 4, 8, 16], "strides": [2, 4, 4, 8, 8], "use_snake": True}
_PRETRANSFORM = {
    "type": "autoencoder",
    "iterate_batch": True,
    "config": {
        "encoder": {
            "type": "oobleck",
            "requires_grad": False,
            "config": {"in_channels": 2, "latent_dim": 128, **_CODER},
        },
        "decoder": {"type": "oobleck", "config": {"out_channels": 2, "latent_dim": 64, "final_tanh": False, **_CODER}},
        "bottleneck": {"type": "vae"},
        "latent_dim": 64,
        "downsampling_ratio": 2048,
        "io_channels": 2,
    },
}
_BOTH = ["seconds_start", "seconds_total"]


def _config(*, window: int, max_length: int, numbers: list[str], maximum: int, diffusion: dict[str, Any]) -> Any:
    prompt = {"id": "prompt", "type": "t5", "config": {"t5_model_name": "t5-base", "max_length": max_length}}
    ranges = [{"id": id_, "type": "number", "config": {"min_val": 0, "max_val": maximum}} for id_ in numbers]
    return {
        "model_type": "diffusion_cond",
        "sample_size": window,
        "sample_rate": 44_100,
        "audio_channels": 2,
        "model": {
            "pretransform": _PRETRANSFORM,
            "conditioning": {"configs": [prompt, *ranges], "cond_dim": 768},
            "diffusion": {
                "type": "dit",
                "cross_attention_cond_ids": ["prompt", *numbers],
                "global_cond_ids": numbers,
                **diffusion,
            },
            "io_channels": 64,
        },
    }


OPEN_1_0 = _config(
    window=2_097_152,
    max_length=128,
    numbers=_BOTH,
    maximum=512,
    diffusion={
        "config": {
            "io_channels": 64,
            "embed_dim": 1536,
            "depth": 24,
            "num_heads": 24,
            "cond_token_dim": 768,
            "global_cond_dim": 1536,
            "project_cond_tokens": False,
            "transformer_type": "continuous_transformer",
        },
    },
)
OPEN_SMALL = _config(
    window=524_288,
    max_length=64,
    numbers=_BOTH[1:],
    maximum=256,
    diffusion={
        "diffusion_objective": "rf_denoiser",
        "distribution_shift_options": {"min_length": 256, "max_length": 4096},
        "config": {
            "io_channels": 64,
            "embed_dim": 1024,
            "depth": 16,
            "num_heads": 8,
            "cond_token_dim": 768,
            "global_cond_dim": 768,
            "transformer_type": "continuous_transformer",
            "attn_kwargs": {"qk_norm": "ln"},
        },
    },
)


# For each built-in model: the parts of its `model_config.json` that determine the networks.
OFFICIAL_CONFIGS: Mapping[str, dict[str, Any]] = {
    "stable-audio-open-1.0": OPEN_1_0,
    "stable-audio-open-small": OPEN_SMALL,
}


def build_random_model(
    values: Mapping[str, Any],
    card: ModelCard,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    decode_precision: DecodePrecision | None = None,
    seed: int = 0,
) -> SaoModel:
    """Build the model that the config `values` describes on `device`, with random weights.

    `card` has the model's name and default parameters. `dtype` and `decode_precision` are used as in `load_sao`. The
    tokenizer maps every word to the unknown token.
    """
    require_exact_float32()
    target = torch.device(device)
    torch.manual_seed(seed)
    reader = ConfigReader(values)
    config = parse_config(reader)
    with target, torch.no_grad():
        text = _random_text_encoder(config.prompt.max_length)
        components = build_components(config, text)
    for module in components.modules:
        module.eval().requires_grad_(False)
    cast_network(components.denoiser, dtype)
    spec = build_spec(open_card(card, reader, cap_s=None), config)
    precision = resolve_decode_precision(target, decode_precision, dtype=dtype)
    return SaoModel(components, config=config, spec=spec, device=target, decode_precision=precision)


def _random_text_encoder(max_length: int) -> TextEncoder:
    """Build a T5-base encoder, float16."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    config = T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32_128)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    encoder = T5EncoderModel(config).to(torch.float16)
    return TextEncoder(tokenizer, encoder, width=768, max_length=max_length)
