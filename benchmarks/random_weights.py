"""Builds models of the official sizes with random weights, for benchmarks and size checks.

Their output is noise. Therefore no model name of a server refers to them.
"""

from __future__ import annotations

from typing import Any

import torch

from stable_audio_serve.core.catalog import OPEN_FAMILY, DecodePrecision
from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.precision import resolve_decode_precision
from stable_audio_serve.models.registry import BUILT_IN, open_card, sa3_card
from stable_audio_serve.models.sa3 import build as sa3
from stable_audio_serve.models.sa3.config import parse_config as parse_sa3
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.models.sao import build as sao
from stable_audio_serve.models.sao.config import parse_config as parse_open
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.models.text_encoder import TextEncoder
from stable_audio_serve.models.weights import cast_network, require_exact_float32


def build_random_model(
    name: str, *, device: str | torch.device, dtype: torch.dtype, decode_precision: DecodePrecision | None = None
) -> Sa3Model | SaoModel:
    """Build the built-in model `name` at its real size on `device`, with random weights.

    `dtype` and `decode_precision` are used as in `load_sa3`. The tokenizer maps every word to the unknown token.
    """
    require_exact_float32()
    target = torch.device(device)
    torch.manual_seed(0)
    entry, reader = BUILT_IN[name], ConfigReader(official_config(name))
    is_open = entry.card.family == OPEN_FAMILY
    config: Any = parse_open(reader) if is_open else parse_sa3(reader)
    with target, torch.no_grad():
        text = _random_text_encoder(config.prompt.max_length, is_open=is_open)
        components: Any = (sao if is_open else sa3).build_components(config, text)
    for module in components.modules:
        module.eval().requires_grad_(False)
    cast_network(components.denoiser, dtype)
    precision = resolve_decode_precision(target, decode_precision, dtype=dtype)
    if is_open:
        spec = sao.build_spec(open_card(entry.card, reader, cap_s=entry.cap_s), config)
        return SaoModel(components, config=config, spec=spec, device=target, decode_precision=precision)
    spec = sa3.build_spec(sa3_card(entry.card, reader, cap_s=entry.cap_s), config, components=components)
    return Sa3Model(components, config=config, spec=spec, device=target, decode_precision=precision)


def official_config(name: str) -> dict[str, Any]:
    """Returns the parts of a built-in model's `model_config.json` that determine the networks."""
    if BUILT_IN[name].card.family == OPEN_FAMILY:
        return _open_config(small=name.endswith("small"))
    return _sa3_config(small=name.startswith("small"), is_base=name.endswith("-base"))


def _sa3_config(*, small: bool, is_base: bool) -> dict[str, Any]:
    sample_size = (5_324_800 if is_base else 5_292_032) if small else 16_777_216
    prompt = {"max_length": 256, "padding_mode": "learned"}
    seconds = {"min_val": 0, "max_val": 384, "fourier_features_type": "expo"}
    denoiser: dict[str, Any] = {
        "io_channels": 256,
        "embed_dim": 1024 if small else 1536,
        "depth": 20 if small else 24,
        "num_heads": 16 if small else 24,
        "cond_token_dim": 768,
        "global_cond_dim": 768,
        "local_add_cond_dim": 257,
        "global_cond_type": "adaLN",
        "timestep_features_type": "expo",
        "num_memory_tokens": 64,
        "norm_type": "rms_norm",
        "norm_kwargs": {"force_fp32": True},
        "ff_kwargs": {"mult": 4.0},
        "attn_kwargs": {"qk_norm": "rms", "differential": not small},
    }
    return {
        "model_type": "diffusion_cond_inpaint",
        "sample_size": sample_size,
        "sample_rate": 44_100,
        "audio_channels": 2,
        "model": {
            "io_channels": 256,
            "pretransform": {"type": "autoencoder", "chunked": True, "config": _same_config(small=small)},
            "conditioning": {
                "cond_dim": 768,
                "configs": [
                    {"id": "prompt", "type": "t5gemma", "config": prompt},
                    {"id": "seconds_total", "type": "number", "config": seconds},
                ],
            },
            "diffusion": {
                "type": "dit",
                "diffusion_objective": "rectified_flow" if is_base else "rf_denoiser",
                "cross_attention_cond_ids": ["prompt", "seconds_total"],
                "global_cond_ids": ["seconds_total"],
                "local_add_cond_ids": ["inpaint_mask", "inpaint_masked_input"],
                "mask_padding_attention": True,
                "use_effective_length_for_schedule": True,
                "config": denoiser,
            },
        },
    }


def _same_config(*, small: bool) -> dict[str, Any]:
    coder: dict[str, Any] = {
        "channels": 128 if small else 256,
        "c_mults": [6],
        "dim_heads": 64,
        "latent_dim": 256,
        "strides": [16],
        "transformer_depths": [6 if small else 12],
        "differential": True,
        "variable_stride": True,
    }
    coder |= {"chunk_size": 32, "chunk_midpoint_shift": True, "dyt": True} if small else {"sliding_window": [1, 1]}
    encoder = coder | {"in_channels": 512, "conv_mapping": False, "mask_noise": 0.0 if small else 0.001}
    decoder = coder | {"out_channels": 512, "conv_mapping": small, "mask_noise": 0.01 if small else 0.1}
    return {
        "encoder": {"type": "taae_v2", "config": encoder},
        "decoder": {"type": "taae_v2", "config": decoder | {"sinusoidal_blocks": [0 if small else 8]}},
        "bottleneck": {"type": "softnorm", "config": {"dim": 256, "auto_scale": True, "noise_regularize": True}},
        "pretransform": {"type": "patched", "config": {"channels": 2, "patch_size": 256}},
        "latent_dim": 256,
        "downsampling_ratio": 4096,
        "io_channels": 2,
    }


def _open_config(*, small: bool) -> dict[str, Any]:
    numbers = ["seconds_total"] if small else ["seconds_start", "seconds_total"]
    prompt = {"t5_model_name": "t5-base", "max_length": 64 if small else 128}
    seconds = {"min_val": 0, "max_val": 256 if small else 512}
    denoiser: dict[str, Any] = {
        "io_channels": 64,
        "embed_dim": 1024 if small else 1536,
        "depth": 16 if small else 24,
        "num_heads": 8 if small else 24,
        "cond_token_dim": 768,
        "global_cond_dim": 768 * len(numbers),
        "transformer_type": "continuous_transformer",
    }
    denoiser |= {"attn_kwargs": {"qk_norm": "ln"}} if small else {"project_cond_tokens": False}
    diffusion = {
        "type": "dit",
        "cross_attention_cond_ids": ["prompt", *numbers],
        "global_cond_ids": numbers,
        "config": denoiser,
    }
    if small:
        diffusion["diffusion_objective"] = "rf_denoiser"
        diffusion["distribution_shift_options"] = {"min_length": 256, "max_length": 4096}
    coder = {"channels": 128, "c_mults": [1, 2, 4, 8, 16], "strides": [2, 4, 4, 8, 8], "use_snake": True}
    encoder = coder | {"in_channels": 2, "latent_dim": 128}
    autoencoder = {
        "encoder": {"type": "oobleck", "requires_grad": False, "config": encoder},
        "decoder": {"type": "oobleck", "config": coder | {"out_channels": 2, "latent_dim": 64, "final_tanh": False}},
        "bottleneck": {"type": "vae"},
        "latent_dim": 64,
        "downsampling_ratio": 2048,
        "io_channels": 2,
    }
    return {
        "model_type": "diffusion_cond",
        "sample_size": 524_288 if small else 2_097_152,
        "sample_rate": 44_100,
        "audio_channels": 2,
        "model": {
            "io_channels": 64,
            "pretransform": {"type": "autoencoder", "iterate_batch": True, "config": autoencoder},
            "conditioning": {
                "cond_dim": 768,
                "configs": [
                    {"id": "prompt", "type": "t5", "config": prompt},
                    *({"id": id_, "type": "number", "config": seconds} for id_ in numbers),
                ],
            },
            "diffusion": diffusion,
        },
    }


def _random_text_encoder(max_length: int, *, is_open: bool) -> TextEncoder:
    """Build a text encoder of the official size: T5-base in float16, or T5Gemma in bfloat16."""
    import tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        T5Config,
        T5EncoderModel,
        T5GemmaConfig,
        T5GemmaEncoderModel,
        T5GemmaModuleConfig,
    )

    if is_open:
        config = T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32_128)
        encoder = T5EncoderModel(config).to(torch.float16)
    else:
        sizes = T5GemmaModuleConfig(
            vocab_size=256_000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=12,
            head_dim=64,
            query_pre_attn_scalar=64,
            attn_logit_softcapping=50.0,
            max_position_embeddings=8192,
        )
        config = T5GemmaConfig(encoder=sizes, decoder=sizes, is_encoder_decoder=False, attn_implementation="eager")
        encoder = T5GemmaEncoderModel(config).to(torch.bfloat16)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    return TextEncoder(tokenizer, encoder, width=768, max_length=max_length)
