"""The diffusion transformer of Stable Audio Open models: predicts v or velocity from latents, time and conditioning.

Module names are the checkpoint's keys below `model.model.`. Independent of samplers, guidance and requests. Values that
depend on neither latents nor time are computed once per request (`condition`) and passed to every step.

Shapes: B rows, D latent channels, F latent frames, T context tokens, W width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stable_audio_serve.models.blocks.attention import CrossAttention, SelfAttention
from stable_audio_serve.models.blocks.feedforward import FeedForward, add_branch
from stable_audio_serve.models.blocks.layouts import Layout
from stable_audio_serve.models.blocks.rotary import RotaryTable
from stable_audio_serve.models.native_denoiser import (
    DenoiserConditioning,
    NativeDenoiser,
    NativeLayer,
    NativeTransformer,
)
from stable_audio_serve.models.sao.network_config import DenoiserConfig

_NORM_EPS = 1e-5


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


class TransformerLayer(NativeLayer):
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
            num_key_heads=config.num_key_heads,
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


class Transformer(NativeTransformer[TransformerLayer]):
    """The transformer with its input and output projections. The global vector is a token before the frames.

    Rotary positions count this token, too.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__(config)
        self.shared_by = config.num_heads // config.num_key_heads  # query heads per head of keys and values
        self.layers.extend(TransformerLayer(config) for _ in range(config.depth))

    def forward(self, x: Tensor, global_embed: Tensor, *, conditioning: DenoiserConditioning, layout: Layout) -> Tensor:
        """Latents x (rows, frames, latent channels) -> output (rows, frames, latent channels).

        `global_embed` (rows, width) includes the embedding of time.
        """
        h = layout.join(global_embed[:, None], self.project_in(x))
        rotary = self.rotary_table(layout.positions(h.device))
        context = conditioning.context
        if context is not None and not layout.shares_heads:
            context = share_heads(context, self.shared_by)
        for index, layer in enumerate(self.layers):
            keys = None if context is None else layout.context(context, layer=index)
            h = layer(h, layout=layout, rotary=rotary.layer(index), context=keys)
        return self.project_out(layout.frames(h))


class Denoiser(NativeDenoiser):
    """The whole network, which predicts v or velocity."""

    transformer: Transformer

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__(config, time_features=LearnedFourier(config.time_features))
        self.transformer = Transformer(config)


def share_heads(context: Tensor, shared_by: int) -> Tensor:
    """Repeat each head of keys and values (axis 3) `shared_by` times, so that each query head has its own."""
    return context if shared_by == 1 else context.repeat_interleave(shared_by, dim=3)
