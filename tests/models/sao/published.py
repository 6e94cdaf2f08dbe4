"""The configs of the two published models, as far as they shape the networks."""

from __future__ import annotations

from typing import Any

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
