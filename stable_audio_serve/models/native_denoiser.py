"""What the diffusion transformers of the model families have in common: dimensions, embedders, and input and output.

Shapes: B rows, D latent channels, F latent frames, T context tokens, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from stable_audio_serve.models.blocks.attention import CrossAttention, SelfAttention
from stable_audio_serve.models.blocks.fused import FusedModule
from stable_audio_serve.models.blocks.layouts import Layout, Padded
from stable_audio_serve.models.blocks.rotary import RotaryEmbedding, RotaryTable, gather_affine
from stable_audio_serve.models.config_reader import MAX_DEPTH, ConfigReader

_MIN_ROTATED = 32  # smallest number of channels with rotary positions in a head


@dataclass(frozen=True, slots=True)
class DenoiserConfig:
    """The dimensions that every diffusion transformer has. `num_prefix` tokens precede the frames of each row."""

    latent_channels: int
    width: int
    depth: int
    num_heads: int
    num_prefix: int
    context_width: int
    global_width: int
    ff_mult: float
    head_norm: str
    time_features: int

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads

    @property
    def key_width(self) -> int:
        """The width of the context inside the network. Keys and values of cross-attention have the same total width."""
        return self.width

    @property
    def num_key_heads(self) -> int:
        """The number of heads of keys and values in cross-attention."""
        return self.key_width // self.head_width


def parse_transformer(config: ConfigReader) -> dict[str, Any]:
    """Parse what every family reads in the same way from `model.diffusion.config`, to fields of `DenoiserConfig`.

    Raises CheckpointError naming the key that cannot be used.
    """
    config.require(
        patch_size=1,
        transformer_type="continuous_transformer",
        project_global_cond=True,
        timestep_cond_type="global",
        input_concat_dim=0,
        prepend_cond_dim=0,
        sliding_window=None,
        causal=False,
        conformer=False,
        layer_scale=False,
        remove_norms=False,
        rotary_pos_emb=True,
        use_sinusoidal_emb=False,
        use_abs_pos_emb=False,
        final_cross_attn_ix=-1,
        add_rope=False,
    )
    feedforward = config.section("ff_kwargs", optional=True)
    feedforward.require(glu=True, no_bias=False, use_conv=False)
    config.section("attn_kwargs", optional=True).require(feat_scale=False)
    width, num_heads = config.integer("embed_dim", default=768), config.integer("num_heads", default=8)
    if width % num_heads:
        raise config.unusable("num_heads", f"a divisor of embed_dim ({width})")
    if width // num_heads < _MIN_ROTATED:
        raise config.unusable("num_heads", f"at most embed_dim / {_MIN_ROTATED}")
    return {
        "latent_channels": config.integer("io_channels", default=32),
        "width": width,
        "depth": config.integer("depth", default=12, at_most=MAX_DEPTH),
        "num_heads": num_heads,
        "context_width": config.integer("cond_token_dim"),
        "global_width": config.integer("global_cond_dim"),
        "ff_mult": feedforward.number("mult", default=4.0, at_least=0.01),
        "time_features": config.even("timestep_features_dim", default=256),
    }


@dataclass(frozen=True, slots=True)
class DenoiserConditioning:
    """The inputs of a forward pass besides latents and time. Each is one tensor for all rows and layers.

    `global_embed` is (rows, width). `context` (rows, layers, 2, key heads, context tokens, head width) has the
    normalised keys and then the values of the cross-attention. It is None for the unconditional branch, where the
    values would be zero. `local` (rows, layers, frames, width) is the local (per-frame) conditioning; its third axis
    has length 1 if all frames are equal. It is None if the network has no local conditioning. An input of zeros does
    not give a `local` of zeros, because the embedder has biases.
    """

    global_embed: Tensor
    context: Tensor | None
    local: Tensor | None = None

    def without_context(self) -> DenoiserConditioning:
        """Returns the unconditional branch: the same row with all context tokens zero."""
        return replace(self, context=None)


class NativeLayer(FusedModule):
    """Base class of a layer of the transformer."""

    self_attn: SelfAttention
    cross_attn: CrossAttention


Layer = TypeVar("Layer", bound=NativeLayer)


class NativeTransformer(nn.Module, Generic[Layer]):
    """Base class of a transformer with its input and output projections."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.project_in = nn.Linear(config.latent_channels, config.width, bias=False)
        self.project_out = nn.Linear(config.width, config.latent_channels, bias=False)
        self.rotary_pos_emb = RotaryEmbedding(max(config.head_width // 2, _MIN_ROTATED))
        self.layers = nn.ModuleList()

    @property
    def typed_layers(self) -> Sequence[Layer]:
        return [cast("Layer", layer) for layer in self.layers]

    def rotary_table(self, positions: Tensor) -> RotaryTable:
        """Returns the rotary table of all layers for tokens at `positions` (tokens,) float32."""
        norms = [(layer.self_attn.q_norm, layer.self_attn.k_norm) for layer in self.typed_layers]
        affine = gather_affine(norms, half=self.rotary_pos_emb.half_width)
        return affine.table(positions, rates=self.rotary_pos_emb.rates(self.head_width))


class NativeDenoiser(FusedModule):
    """Base class of a whole network: a residual 1x1 convolution before and after the transformer, and the
    conditioning's embedders.

    Rows do not affect each other. Invalid frames are never keys, and their output is unspecified. Inputs are cast to
    the weights' dtype, and the result has that dtype. Only the Fourier features of time are computed in float32 in
    every precision.
    """

    transformer: NativeTransformer[Any]

    def __init__(self, config: DenoiserConfig, *, time_features: nn.Module) -> None:
        super().__init__()
        width, channels = config.width, config.latent_channels
        self.config = config
        self.timestep_features = time_features
        self.to_timestep_embed = mlp(config.time_features, width, bias=True)
        self.to_cond_embed = mlp(config.context_width, config.key_width, bias=False)
        self.to_global_embed = mlp(config.global_width, width, bias=False)
        self.preprocess_conv = nn.Conv1d(channels, channels, 1, bias=False)
        self.postprocess_conv = nn.Conv1d(channels, channels, 1, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.preprocess_conv.weight.dtype

    def resolve(self) -> None:
        """Prepare the weights for inference on a GPU. Call it after they are loaded and on their device."""

    def condition(self, context: Tensor | None, global_cond: Tensor) -> DenoiserConditioning:
        """Returns the conditioning for `forward`, which does not depend on latents or time.

        `context` is (rows, context tokens, context width), and `global_cond` (rows, global width).
        """
        keys = None if context is None else self.project_context(context)
        return DenoiserConditioning(self.to_global_embed(global_cond.to(self.dtype)), keys)

    def project_context(self, context: Tensor) -> Tensor:
        """Returns the cross-attention keys and values of all layers, in the shape of `DenoiserConditioning.context`.

        `context` is (rows, context tokens, context width).
        """
        tokens, layers = self.to_cond_embed(context.to(self.dtype)), self.transformer.typed_layers
        parts = [part for layer in layers for part in layer.cross_attn.project_context(tokens)]
        return torch.cat(parts, dim=1).unflatten(1, (len(layers), 2, -1))

    def embed_time(self, t: Tensor) -> Tensor:
        """Times t (rows,) in 0..1 -> embeddings (rows, width)."""
        return self.to_timestep_embed(self.timestep_features(t).to(self.dtype))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        conditioning: DenoiserConditioning,
        valid: Tensor | None = None,
        packed: Layout | None = None,
    ) -> Tensor:
        """Returns v or velocity for latents `x` (rows, latent channels, frames) at times `t` (rows,) float32.

        `valid` (rows, frames) marks the frames that are not padding; None: all frames. If `packed` is given, `x` and
        the result are (1, latent channels, frames of all rows), and `conditioning` must be the conditioning of a packed
        batch.
        """
        x = x.to(self.dtype)
        x = x + self.preprocess_conv(x)
        global_embed = conditioning.global_embed + self.embed_time(t)
        layout = packed or Padded(x.shape[-1], num_prefix=self.config.num_prefix, valid=valid, dtype=x.dtype)
        out = self.transformer(x.transpose(1, 2), global_embed, conditioning=conditioning, layout=layout)
        out = out.transpose(1, 2)
        return out + self.postprocess_conv(out)


def mlp(width_in: int, width_out: int, *, bias: bool, hidden: int | None = None) -> nn.Sequential:
    """Returns two linear layers with the activation SiLU between them."""
    hidden = hidden or width_out
    first, last = nn.Linear(width_in, hidden, bias=bias), nn.Linear(hidden, width_out, bias=bias)
    return nn.Sequential(first, nn.SiLU(), last)
