"""Builds models of the official sizes with random weights, for benchmarks and size checks.

Their output is noise. Therefore no model name of a server refers to them.
"""

from __future__ import annotations

from typing import Any

import torch

from stable_audio_serve.core.catalog import DecodePrecision
from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.precision import resolve_decode_precision
from stable_audio_serve.models.registry import BUILT_IN, sa3_card
from stable_audio_serve.models.sa3.build import build_components, build_spec
from stable_audio_serve.models.sa3.config import parse_config
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.models.text_encoder import TextEncoder
from stable_audio_serve.models.weights import cast_network, require_exact_float32

_SMALL_SAME = {"channels": 128, "transformer_depths": [6], "chunk_size": 32, "chunk_midpoint_shift": True, "dyt": True}
_MEDIUM_SAME = {"channels": 256, "transformer_depths": [12], "sliding_window": [1, 1]}
_SAME = {
    "c_mults": [6],
    "dim_heads": 64,
    "latent_dim": 256,
    "strides": [16],
    "differential": True,
    "variable_stride": True,
}


def official_config(name: str) -> dict[str, Any]:
    """Returns the parts of a built-in model's `model_config.json` that determine the networks."""
    small = name.startswith("small")
    same = {**_SAME, **(_SMALL_SAME if small else _MEDIUM_SAME)}
    mask_noise = (0.0, 0.01) if small else (0.001, 0.1)
    encoder = {**same, "in_channels": 512, "conv_mapping": False, "mask_noise": mask_noise[0]}
    decoder = {
        **same,
        "out_channels": 512,
        "conv_mapping": small,
        "mask_noise": mask_noise[1],
        "sinusoidal_blocks": [0] if small else [8],
    }
    autoencoder = {
        "encoder": {"type": "taae_v2", "config": encoder},
        "decoder": {"type": "taae_v2", "config": decoder},
        "bottleneck": {"type": "softnorm", "config": {"dim": 256, "auto_scale": True, "noise_regularize": True}},
        "pretransform": {"type": "patched", "config": {"channels": 2, "patch_size": 256}},
        "latent_dim": 256,
        "downsampling_ratio": 4096,
        "io_channels": 2,
    }
    is_base = name.endswith("-base")
    sample_size = (5_324_800 if is_base else 5_292_032) if small else 16_777_216
    return {
        "model_type": "diffusion_cond_inpaint",
        "sample_size": sample_size,
        "sample_rate": 44100,
        "audio_channels": 2,
        "model": {
            "io_channels": 256,
            "pretransform": {"type": "autoencoder", "chunked": True, "config": autoencoder},
            "conditioning": _conditioning(),
            "diffusion": _diffusion(small=small, objective="rectified_flow" if is_base else "rf_denoiser"),
        },
    }


def _conditioning() -> dict[str, Any]:
    prompt = {"max_length": 256, "padding_mode": "learned"}
    seconds = {"min_val": 0, "max_val": 384, "fourier_features_type": "expo"}
    configs = [
        {"id": "prompt", "type": "t5gemma", "config": prompt},
        {"id": "seconds_total", "type": "number", "config": seconds},
    ]
    return {"cond_dim": 768, "configs": configs}


def _diffusion(*, small: bool, objective: str) -> dict[str, Any]:
    network = {
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
        "type": "dit",
        "diffusion_objective": objective,
        "cross_attention_cond_ids": ["prompt", "seconds_total"],
        "global_cond_ids": ["seconds_total"],
        "local_add_cond_ids": ["inpaint_mask", "inpaint_masked_input"],
        "mask_padding_attention": True,
        "use_effective_length_for_schedule": True,
        "config": network,
    }


def build_random_model(
    name: str,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    decode_precision: DecodePrecision | None = None,
    seed: int = 0,
) -> Sa3Model:
    """Build the built-in model `name` at its real size on `device`, with random weights.

    `dtype` and `decode_precision` are used as in `load_sa3`. The tokenizer maps every word to the unknown token.
    """
    require_exact_float32()
    target = torch.device(device)
    torch.manual_seed(seed)
    reader = ConfigReader(official_config(name))
    config = parse_config(reader)
    with target, torch.no_grad():
        text = _random_text_encoder(config.prompt.max_length)
        components = build_components(config, text)
    for module in components.modules:
        module.eval().requires_grad_(False)
    cast_network(components.denoiser, dtype)
    spec = build_spec(sa3_card(BUILT_IN[name].card, reader, cap_s=BUILT_IN[name].cap_s), config, components=components)
    precision = resolve_decode_precision(target, decode_precision, dtype=dtype)
    return Sa3Model(components, config=config, spec=spec, device=target, decode_precision=precision)


def _random_text_encoder(max_length: int) -> TextEncoder:
    """Build a T5Gemma encoder of the official size, bfloat16."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        T5GemmaConfig,
        T5GemmaEncoderModel,
        T5GemmaModuleConfig,
    )

    sizes: dict[str, Any] = {
        "vocab_size": 256_000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "attn_logit_softcapping": 50.0,
        "max_position_embeddings": 8192,
    }
    config = T5GemmaConfig(
        encoder=T5GemmaModuleConfig(**sizes),
        decoder=T5GemmaModuleConfig(**sizes),
        is_encoder_decoder=False,
        attn_implementation="eager",
    )
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    encoder = T5GemmaEncoderModel(config).to(torch.bfloat16)
    return TextEncoder(tokenizer, encoder, width=sizes["hidden_size"], max_length=max_length)
