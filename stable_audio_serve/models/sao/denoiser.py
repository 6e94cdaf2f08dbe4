"""The diffusion transformer of Stable Audio Open models: predicts v or velocity from latents, time and conditioning.

Module names are the checkpoint's keys below `model.model.`. Independent of samplers, guidance and requests. Values that
depend on neither latents nor time are computed once per request (`condition`) and passed to every step.

Shapes: B rows, D latent channels, F latent frames, T context tokens, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stable_audio_serve.models.blocks import (
    CrossAttention,
    FeedForward,
    Layout,
    Padded,
    RotaryEmbedding,
    RotaryTable,
    SelfAttention,
    add_branch,
    gather_affine,
)
from stable_audio_serve.models.sao.network_config import MIN_ROTATED, DenoiserConfig

NUM_PREFIX = 1  # tokens before each row's frames: one, the global conditioning vector
_NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class DenoiserConditioning:
    """The inputs of a forward pass besides latents and time, for B rows.

    `global_embed` is (rows, width). `context` (rows, layers, 2, key heads, context tokens, head width) has the
    normalised keys and then the values of each layer's cross-attention. It is None for the unconditional branch, where
    the values would be zero.
    """

    global_embed: Tensor
    context: Tensor | None

    def without_context(self) -> DenoiserConditioning:
        """Returns the unconditional branch: the same row with all context tokens zero."""
        return DenoiserConditioning(self.global_embed, None)


class LearnedFourier(nn.Module):
    """The features `[cos a, sin a]` of the diffusion time t, with `a = (2 pi t) w` and learned frequencies w.

    Computed in float32. The frequencies are a buffer, because half-precision networks keep buffers in float32.
    """

    weight: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(width // 2, 1).normal_())

    def forward(self, t: Tensor) -> Tensor:
        """Returns features (rows, width) float32 of times t (rows,)."""
        angles = (2 * math.pi * t.float()[:, None]) @ self.weight.float().T
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ScaledLayerNorm(nn.Module):
    """Layer norm with a learned scale. Checkpoints also contain a shift, which is zero unless it was trained, too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        # A parameter instead of a buffer, so that `cast_network` casts it together with gamma.
        self.beta = nn.Parameter(torch.zeros(width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalised x (..., width), in the dtype of x."""
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta, _NORM_EPS)


class TransformerLayer(nn.Module):
    """Applies self-attention, cross-attention and a feed-forward network, each after a norm."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        width = config.width
        self.pre_norm = ScaledLayerNorm(width)
        self.self_attn = SelfAttention(
            width, num_heads=config.num_heads, differential=False, head_norm=config.head_norm
        )
        self.cross_attend_norm = ScaledLayerNorm(width)
        self.cross_attn = CrossAttention(
            width,
            context_width=config.key_width,
            num_heads=config.num_heads,
            num_key_heads=config.key_width // config.head_width,
            differential=False,
            head_norm=config.head_norm,
        )
        self.ff_norm = ScaledLayerNorm(width)
        self.ff = FeedForward(width, mult=config.ff_mult)

    def forward(
        self, h: Tensor, *, layout: Layout, rotary: RotaryTable, context: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Returns the tokens after this layer. `layout` defines the shape of `h`.

        `context` has keys and values as `layout.context` returns them.
        """
        h = h + self.self_attn(self.pre_norm(h), rotary=rotary, attend_fn=layout.attend)
        if context is not None:
            (key, value), normed = context, self.cross_attend_norm(h)
            h = add_branch(h, self.cross_attn(normed, key=key, value=value, attend_fn=layout.attend_context))
        return add_branch(h, self.ff(self.ff_norm(h)))


class Transformer(nn.Module):
    """The transformer with its input and output projections. The global vector is a token before the frames.

    Rotary positions count this token, too.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.project_in = nn.Linear(config.latent_channels, config.width, bias=False)
        self.project_out = nn.Linear(config.width, config.latent_channels, bias=False)
        self.head_width = config.head_width
        self.shared_by = config.width // config.key_width  # query heads per head of keys and values
        self.rotary_pos_emb = RotaryEmbedding(max(config.head_width // 2, MIN_ROTATED))
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.depth))

    def forward(
        self,
        x: Tensor,
        *,
        global_embed: Tensor,
        context: Tensor | None,
        layout: Layout,
    ) -> Tensor:
        """Latents x (rows, frames, latent channels) -> output (rows, frames, latent channels).

        `global_embed` (rows, width) includes the embedding of time.
        """
        h = layout.join(global_embed[:, None], self.project_in(x))
        rotary = self.rotary_table(layout.positions(h.device))
        if context is not None and not layout.shares_heads:
            context = share_heads(context, self.shared_by)
        for index, layer in enumerate(self.layers):
            keys = None if context is None else layout.context(context, layer=index)
            h = layer(h, layout=layout, rotary=rotary.layer(index), context=keys)
        return self.project_out(layout.frames(h))

    def rotary_table(self, positions: Tensor) -> RotaryTable:
        """Returns the rotary table of all layers for tokens at `positions` (tokens,) float32."""
        norms = [(layer.self_attn.q_norm, layer.self_attn.k_norm) for layer in self.typed_layers]
        affine = gather_affine(norms, half=self.rotary_pos_emb.half_width)
        return affine.table(positions, rates=self.rotary_pos_emb.rates(self.head_width))

    @property
    def typed_layers(self) -> Sequence[TransformerLayer]:
        return [layer for layer in self.layers if isinstance(layer, TransformerLayer)]


class Denoiser(nn.Module):
    """The whole network: a residual 1x1 convolution before and after the transformer, and the conditioning's embedders.

    Rows do not affect each other. Invalid frames are never keys, and their output is unspecified. Inputs are cast to
    the weights' dtype, and the result has that dtype. The Fourier features of time are always computed in float32.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        width, channels = config.width, config.latent_channels
        self.timestep_features = LearnedFourier(config.time_features)
        self.to_timestep_embed = _mlp(config.time_features, width, bias=True)
        self.to_cond_embed = _mlp(config.context_width, config.key_width, bias=False)
        self.to_global_embed = _mlp(config.global_width, width, bias=False)
        self.preprocess_conv = nn.Conv1d(channels, channels, 1, bias=False)
        self.postprocess_conv = nn.Conv1d(channels, channels, 1, bias=False)
        self.transformer = Transformer(config)

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.preprocess_conv.weight.dtype

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
        the result are (1, latent channels, frames of all rows).
        """
        x = x.to(self.dtype)
        x = x + self.preprocess_conv(x)
        global_embed = conditioning.global_embed + self.embed_time(t)
        layout = packed or Padded(x.shape[-1], num_prefix=NUM_PREFIX, valid=valid, dtype=x.dtype)
        out = self.transformer(
            x.transpose(1, 2), global_embed=global_embed, context=conditioning.context, layout=layout
        ).transpose(1, 2)
        return out + self.postprocess_conv(out)


def share_heads(context: Tensor, shared_by: int) -> Tensor:
    """Repeat each head of keys and values (axis 3) `shared_by` times, so that each query head has its own."""
    return context if shared_by == 1 else context.repeat_interleave(shared_by, dim=3)


def _mlp(width_in: int, width_out: int, *, bias: bool) -> nn.Sequential:
    first, last = nn.Linear(width_in, width_out, bias=bias), nn.Linear(width_out, width_out, bias=bias)
    return nn.Sequential(first, nn.SiLU(), last)
