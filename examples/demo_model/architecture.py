"""The dimensions of the demo model, as the content of the checkpoint's `model_config.json`, and its text encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from examples.demo_model.scenes import DEFAULT_TEMPO_BPM
from examples.demo_model.vocabulary import (
    FIRST_PITCH,
    LAST_PITCH,
    MAX_TOKENS,
    TEMPO_PATTERN,
    WORDS,
    vocabulary,
)
from stable_audio_serve.models.oscillator.bank import NUM_CHANNELS, SAMPLE_RATE_HZ
from stable_audio_serve.models.oscillator.timeline import NUM_TIMELINE_FEATURES

HOP = 4096
PATCH_FRAMES = 8
LATENT_DIM = 64
COND_DIM = 128
MAX_SECONDS = 48.0
# The longest training clip. All longer clips have the same duration embedding. The denoiser distinguishes them by the
# timeline features of each frame.
LONGEST_TRAINED_S = 12.0
HEADROOM_S = 0.4
TEXT_FOLDER = "t5gemma"
FRAME_S = HOP / SAMPLE_RATE_HZ


def model_config() -> dict[str, Any]:
    """Returns the content of the checkpoint's `model_config.json`."""
    patch = {"patch_frames": PATCH_FRAMES, "width": 384}
    return {
        "model_type": "diffusion_cond_inpaint",
        "sample_size": int((MAX_SECONDS + HEADROOM_S) * SAMPLE_RATE_HZ) // (2 * HOP) * 2 * HOP + 2 * HOP,
        "sample_rate": SAMPLE_RATE_HZ,
        "audio_channels": 2,
        "model": {
            "io_channels": LATENT_DIM,
            "pretransform": {
                "type": "autoencoder",
                "chunked": True,
                "iterate_batch": False,
                "config": {
                    "encoder": {
                        "type": "patch_mlp",
                        "config": {"in_channels": NUM_CHANNELS, "latent_dim": LATENT_DIM, "depth": 1, **patch},
                    },
                    "decoder": {
                        "type": "patch_mlp",
                        "config": {"out_channels": NUM_CHANNELS, "latent_dim": LATENT_DIM, "depth": 2, **patch},
                    },
                    "bottleneck": {
                        "type": "softnorm",
                        "config": {"dim": LATENT_DIM, "auto_scale": True, "noise_regularize": False},
                    },
                    "pretransform": {
                        "type": "oscillator_bank",
                        "config": {"channels": 2, "frames_per_latent": PATCH_FRAMES},
                    },
                    "latent_dim": LATENT_DIM,
                    "downsampling_ratio": HOP,
                    "io_channels": 2,
                },
            },
            "conditioning": {"cond_dim": COND_DIM, "configs": _conditioners()},
            "diffusion": {
                "type": "dit",
                "diffusion_objective": "rf_denoiser",
                "cross_attention_cond_ids": ["prompt", "seconds_total"],
                "global_cond_ids": ["seconds_total"],
                "local_add_cond_ids": ["inpaint_mask", "inpaint_masked_input", "timeline"],
                "mask_padding_attention": True,
                "use_effective_length_for_schedule": True,
                "config": {
                    "io_channels": LATENT_DIM,
                    "embed_dim": 192,
                    "depth": 5,
                    "num_heads": 6,
                    "cond_token_dim": COND_DIM,
                    "global_cond_dim": COND_DIM,
                    "local_add_cond_dim": 1 + LATENT_DIM + NUM_TIMELINE_FEATURES,
                    "global_cond_type": "adaLN",
                    "timestep_features_type": "expo",
                    "timestep_features_dim": 64,
                    "num_memory_tokens": 4,
                    "norm_type": "rms_norm",
                    "norm_kwargs": {"force_fp32": True},
                    "ff_kwargs": {"mult": 1.5},
                    "attn_kwargs": {"qk_norm": "rms", "differential": False},
                },
            },
        },
    }


def _conditioners() -> list[dict[str, Any]]:
    prompt = {"model_path": TEXT_FOLDER, "max_length": MAX_TOKENS, "padding_mode": "learned"}
    seconds = {"min_val": 0, "max_val": LONGEST_TRAINED_S, "fourier_features_type": "expo"}
    tempo = {"pattern": TEMPO_PATTERN, "default": DEFAULT_TEMPO_BPM, "min_val": 30, "max_val": 300}
    return [
        {"id": "prompt", "type": "t5gemma", "config": prompt},
        {"id": "seconds_total", "type": "number", "config": seconds},
        {"id": "timeline", "type": "timeline", "config": {"tempo": tempo}},
    ]


def build_text_encoder() -> nn.Module:
    """Build a tiny, untrained T5Gemma encoder. The embeddings of its pitch tokens are smooth functions of pitch."""
    # Imported here, because it loads in 2 s and few programs need it.
    from transformers import T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig

    half = {
        "vocab_size": len(vocabulary()),
        "hidden_size": COND_DIM,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "max_position_embeddings": 64,
        "sliding_window": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    config = T5GemmaConfig(
        encoder=T5GemmaModuleConfig(**half),
        decoder=T5GemmaModuleConfig(**half),
        is_encoder_decoder=False,
        dropout_rate=0.0,
        attention_dropout=0.0,
        vocab_size=half["vocab_size"],
        attn_implementation="eager",
    )
    encoder = T5GemmaEncoderModel(config)
    with torch.no_grad():
        encoder.get_input_embeddings().weight.copy_(_initial_embeddings())
    return encoder


def _initial_embeddings() -> torch.Tensor:
    """Returns initial embeddings (vocabulary, COND_DIM): random for words, sines of the index for pitches."""
    table = torch.randn(len(vocabulary()), COND_DIM)
    index = torch.arange(FIRST_PITCH, LAST_PITCH + 1, dtype=torch.float32)[:, None]
    periods = torch.tensor([4.0, 6.0, 8.0, 12.0, 17.0, 24.0, 24.0, 34.0, 48.0, 96.0, 192.0, 384.0])
    angle = 2.0 * torch.pi * index / periods
    waves = 1.4 * torch.cat([angle.cos(), angle.sin()], dim=1)
    first = 4 + len(WORDS)
    for role in range(2):  # tokens for pitches, then for the target of a sweep
        rows = slice(first + role * len(index), first + (role + 1) * len(index))
        mark = torch.randn(COND_DIM)
        table[rows] = mark
        table[rows, : waves.shape[1]] = waves
    return table / COND_DIM**0.5
