"""A checkpoint's `model_config.json` as frozen values: every dimension of the networks comes from here.

A missing key means the reference constructor's default. A value that would need another network is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from stable_audio_serve.models.blocks.norms import HEAD_NORMS
from stable_audio_serve.models.config_reader import ConfigReader

MIN_ROTATED = 32  # channels of a denoiser head that carry its position, at least


@dataclass(frozen=True, slots=True)
class DenoiserConfig:
    """Shape of the diffusion transformer; `local_width` 0 means that it takes no local conditioning."""

    latent_channels: int
    width: int
    depth: int
    num_heads: int
    context_width: int
    global_width: int
    local_width: int
    num_memory_tokens: int
    ff_mult: float
    differential: bool
    head_norm: str
    norm_eps: float
    time_features: int
    time_logsnr: bool


def parse_denoiser(config: ConfigReader) -> DenoiserConfig:
    """`model.diffusion.config`. Raises CheckpointError naming the key that cannot be used."""
    config.require(
        patch_size=1,
        transformer_type="continuous_transformer",
        project_cond_tokens=True,
        project_global_cond=True,
        timestep_cond_type="global",
        timestep_features_type="expo",
        input_concat_dim=0,
        prepend_cond_dim=0,
        norm_type="rms_norm",
        sliding_window=None,
        causal=False,
        conformer=False,
        layer_scale=False,
        rotary_pos_emb=True,
        use_sinusoidal_emb=False,
        use_abs_pos_emb=False,
    )
    config.choice("global_cond_type", ("adaLN",), default="prepend")
    config.choice("timestep_features_type", ("expo",), default="learned")
    config.choice("norm_type", ("rms_norm",), default="layer_norm")
    attention = config.section("attn_kwargs", optional=True)
    feedforward = config.section("ff_kwargs", optional=True)
    feedforward.require(glu=True, no_bias=False, use_conv=False)
    width = config.integer("embed_dim", default=768)
    num_heads = config.integer("num_heads", default=8)
    if width % num_heads:
        raise config.unusable("num_heads", f"a divisor of embed_dim ({width})")
    if width // num_heads < MIN_ROTATED:
        raise config.unusable("num_heads", f"at most embed_dim / {MIN_ROTATED}")
    time_features = config.integer("timestep_features_dim", default=256, at_least=2)
    if time_features % 2:
        raise config.unusable("timestep_features_dim", "even")
    return DenoiserConfig(
        latent_channels=config.integer("io_channels", default=32),
        width=width,
        depth=config.integer("depth", default=12),
        num_heads=num_heads,
        context_width=config.integer("cond_token_dim"),
        global_width=config.integer("global_cond_dim"),
        local_width=config.integer("local_add_cond_dim", default=0, at_least=0),
        num_memory_tokens=config.integer("num_memory_tokens", default=0, at_least=0),
        ff_mult=feedforward.number("mult", default=4.0, at_least=0.01),
        differential=attention.flag("differential", default=False),
        head_norm=attention.choice("qk_norm", HEAD_NORMS, default="none"),
        norm_eps=config.section("norm_kwargs", optional=True).number("eps", default=1e-5, at_least=0),
        time_features=time_features,
        time_logsnr=config.flag("timestep_features_logsnr", default=False),
    )
