"""The diffusion transformer of the Stable Audio 3 family: maps latents, a time and conditioning to a velocity.

Module names are the checkpoint's keys below `model.model.`. Independent of samplers, guidance and requests. Values that
depend on neither latents nor time are computed once per request (`condition`) and passed to every step.

Shapes: B rows, D latent channels, F latent frames, M memory tokens, T context tokens, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stable_audio_serve.models.adapters.apply import is_adapted
from stable_audio_serve.models.blocks.attention import CrossAttention, SelfAttention
from stable_audio_serve.models.blocks.feedforward import FeedForward, add_branch
from stable_audio_serve.models.blocks.fourier import ExpoFourier
from stable_audio_serve.models.blocks.layouts import Layout
from stable_audio_serve.models.blocks.norms import RMSNorm
from stable_audio_serve.models.blocks.rotary import RotaryTable
from stable_audio_serve.models.native_denoiser import (
    DenoiserConditioning,
    NativeDenoiser,
    NativeLayer,
    NativeTransformer,
    mlp,
)
from stable_audio_serve.models.sa3.config import DenoiserConfig

# A layer whose name contains one of these texts runs in `Denoiser.condition`, not in `Denoiser.forward`.
CONDITION_LAYERS = (".to_cond_embed.", ".to_global_embed.", ".to_local_embed.", ".cross_attn.to_kv")


class Modulation(NamedTuple):
    """Scale, shift and gate of a layer's self-attention or of its feed-forward network, each (rows, width).

    The scale includes the gain of the norm that precedes it.
    """

    scale: Tensor
    shift: Tensor
    gate: Tensor


class Update(NamedTuple):
    """What is added to the tokens next: `values`, which have the shape of the tokens, times `gate` (rows, width).

    A gate of None is 1.
    """

    values: Tensor
    gate: Tensor | None

    def added_to(self, h: Tensor) -> Tensor:
        """Returns a new tensor: the sum of tokens h (rows, tokens, width) and this update."""
        return h + self.values if self.gate is None else torch.addcmul(h, self.gate[:, None], self.values)


class TransformerLayer(NativeLayer):
    """Applies self-attention, cross-attention, local conditioning and the feed-forward network, in this order.

    Self-attention and the feed-forward network are modulated and gated (adaptive norms).
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        width, heads, kind, norm = config.width, config.num_heads, config.differential, config.head_norm
        self.to_scale_shift_gate = nn.Parameter(torch.empty(6 * width).normal_(std=width**-0.5))
        self.pre_norm = RMSNorm(width, eps=config.norm_eps)
        self.self_attn = SelfAttention(width, num_heads=heads, differential=kind, head_norm=norm)
        self.cross_attend_norm = RMSNorm(width, eps=config.norm_eps)
        self.cross_attn = CrossAttention(
            width, context_width=width, num_heads=heads, num_key_heads=heads, differential=kind, head_norm=norm
        )
        self.ff_norm = RMSNorm(width, eps=config.norm_eps)
        self.ff = FeedForward(width, mult=config.ff_mult)
        if config.local_width:
            self.to_local_embed = mlp(config.local_width, width, bias=True)

    def forward(
        self,
        h: Tensor,
        update: Update | None,
        *,
        modulations: tuple[Modulation, Modulation],
        layout: Layout,
        rotary: RotaryTable,
        context: tuple[Tensor, Tensor] | None,
        local: Tensor | None,
    ) -> tuple[Tensor, Update]:
        """Returns the tokens, and the output of this layer's feed-forward network, which is not added to them yet. May
        overwrite `h`.

        `update` is that of the layer before. The sum of tokens and update is computed together with the norm after it,
        because memory traffic limits both. `modulations` are those of the self-attention and of the feed-forward
        network. `layout` defines the shapes of `h` and `local`. `context` has keys and values as `layout.context`
        returns them. `local` is added to frames, but not to memory tokens.
        """
        own, ff = modulations
        h, normed = self._add_and_norm(h, update, norm=self.pre_norm, modulation=own, layout=layout)
        update = Update(self.self_attn(normed, rotary=rotary, attend_fn=layout.attend), own.gate)
        if context is not None:
            h, normed = self._add_and_norm(h, update, norm=self.cross_attend_norm, layout=layout)
            key, value = context
            attended = self.cross_attn(normed, key=key, value=value, attend_fn=layout.attend_context)
            update = Update(attended, gate=None)
        h, normed = self._add_and_norm(h, update, local=local, norm=self.ff_norm, modulation=ff, layout=layout)
        return h, Update(self.ff(normed), ff.gate)

    def _add_and_norm(
        self,
        h: Tensor,
        update: Update | None,
        *,
        local: Tensor | None = None,
        norm: RMSNorm,
        modulation: Modulation | None = None,
        layout: Layout,
    ) -> tuple[Tensor, Tensor]:
        """Returns the sum of the tokens, the update and the local conditioning, and the norm of this sum. May overwrite
        `h`.
        """
        values, gate = update or (None, None)
        if self.kernels is not None and (local is None or local.shape[1] == 1):
            normed = self.kernels.add_and_norm(
                h,
                values,
                gate=gate,
                local=None if local is None else local[:, 0],
                scale=norm.gamma[None] if modulation is None else modulation.scale,
                shift=None if modulation is None else modulation.shift,
                places=layout.places,
                eps=norm.eps,
            )
            return h, normed
        if values is not None:
            h = add_branch(h, values) if gate is None else layout.add_gated(h, values, gate=gate)
        if local is not None:
            layout.add_local(h, local)  # in place: nothing else uses h
        if modulation is None:
            return h, norm(h)
        return h, layout.modulate(norm.without_gain(h), scale=modulation.scale, shift=modulation.shift)


class Transformer(NativeTransformer[TransformerLayer]):
    """The transformer with its input and output projections, and with learned memory tokens before the frames.

    Rotary positions count the memory tokens, too.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__(config)
        width = config.width
        self.num_memory_tokens = config.num_prefix
        if self.num_memory_tokens:
            self.memory_tokens = nn.Parameter(torch.empty(self.num_memory_tokens, width).normal_())
        self.global_cond_embedder = mlp(width, 6 * width, hidden=width, bias=True)
        self.layers.extend(TransformerLayer(config) for _ in range(config.depth))

    def forward(self, x: Tensor, global_embed: Tensor, *, conditioning: DenoiserConditioning, layout: Layout) -> Tensor:
        """Latents x (rows, frames, latent channels) -> output (rows, frames, latent channels).

        `global_embed` (rows, width) includes the embedding of time.
        """
        h = self.project_in(x)
        if self.num_memory_tokens:
            h = layout.join(self.memory_tokens, h)
        rotary = self.rotary_table(layout.positions(h.device))
        modulations = self._modulate(self.global_cond_embedder(global_embed))
        context, local = conditioning.context, conditioning.local
        update: Update | None = None
        for index, layer in enumerate(self.layers):
            h, update = layer(
                h,
                update,
                modulations=modulations[index],
                layout=layout,
                rotary=rotary.layer(index),
                context=None if context is None else layout.context(context, layer=index),
                local=None if local is None else local[:, index],
            )
        if update is not None:
            assert update.gate is not None, "a layer returns the update of its feed-forward network, which has a gate"
            h = layout.add_gated(h, update.values, gate=update.gate)
        return self.project_out(layout.frames(h))

    def _modulate(self, modulation: Tensor) -> list[tuple[Modulation, Modulation]]:
        """Returns each layer's modulations: the shared `modulation` (rows, 6 * width) plus the layer's own offsets.

        A gate g is applied as `sigmoid(1 - g)`.
        """
        offsets = torch.stack([layer.to_scale_shift_gate for layer in self.typed_layers])
        norms = [norm for layer in self.typed_layers for norm in (layer.pre_norm, layer.ff_norm)]
        gains = torch.stack([norm.gamma for norm in norms]).to(offsets.dtype).unflatten(0, (-1, 1, 2))
        scale, shift, gate = (offsets[:, None] + modulation).unflatten(-1, (2, 3, -1)).unbind(3)
        parts = torch.addcmul(gains, gains, scale), shift, torch.sigmoid(1 - gate)
        of_layers = zip(*(part.unbind(0) for part in parts), strict=True)
        return [
            (Modulation(*(part[:, 0] for part in layer)), Modulation(*(part[:, 1] for part in layer)))
            for layer in of_layers
        ]


class _Stacked(NamedTuple):
    """The weights of all layers that `Denoiser.condition` uses. The layers' own parameters are views of them.

    Axis 0 has the layers. `local` has weight and bias of the first and of the last linear layer of the embedders of
    the local conditioning; it is None if the network has no local conditioning.
    """

    to_kv: Tensor  # (layers, key and value channels, width)
    key_gain: Tensor  # (layers, head width)
    key_eps: float
    local: tuple[Tensor, Tensor, Tensor, Tensor] | None


class Denoiser(NativeDenoiser):
    """The whole network, which predicts a velocity.

    The reference implementation first rounds time to the model's dtype. Near t = 1, the angles of the highest Fourier
    features differ by tens of radians between adjacent float16 numbers, so that a half-precision model would see other
    times than the sampler uses.
    """

    config: DenoiserConfig
    transformer: Transformer

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__(config, time_features=ExpoFourier(config.time_features))
        self.transformer = Transformer(config)
        self._stacked: _Stacked | None = None

    def resolve(self) -> None:
        """Stack the weights that `condition` uses, so that it can compute all layers at once if there are fused
        kernels. For inference on a GPU, where starting kernels for each layer takes longer than the kernels.

        The layers' own parameters become views of the stacked weights, so that no memory is needed twice. Call it after
        the weights are loaded and on their device, because `to()` and `load_state_dict(assign=True)` would separate
        them again.
        """
        layers = self.transformer.typed_layers
        norms = [norm for layer in layers if isinstance(norm := layer.cross_attn.k_norm, RMSNorm)]
        if len(norms) < len(layers):
            return
        local = None
        if self.config.local_width:
            first, _, last = zip(*(layer.to_local_embed for layer in layers), strict=True)
            local = _stack_linear(first) + _stack_linear(last)
        self._stacked = _Stacked(
            to_kv=_stack([layer.cross_attn.to_kv.weight for layer in layers]),
            key_gain=_stack([norm.gamma for norm in norms]),
            key_eps=norms[0].eps,
            local=local,
        )

    def condition(
        self, context: Tensor | None, global_cond: Tensor, *, local: Tensor | None = None
    ) -> DenoiserConditioning:
        """Returns the conditioning for `forward`, which does not depend on latents or time. Differentiable
        without fused kernels.

        `context` is (rows, context tokens, context width), `global_cond` (rows, global width), and `local` (rows, local
        width, frames or 1).
        """
        conditioning = super().condition(context, global_cond)
        if local is None:
            return conditioning
        return replace(conditioning, local=self._embed_local(local.to(self.dtype).transpose(1, 2)))

    def project_context(self, context: Tensor) -> Tensor:
        """See `NativeDenoiser`. With fused kernels, the layers are computed together."""
        are_adapted = any(is_adapted(layer.cross_attn.to_kv) for layer in self.transformer.typed_layers)
        if self._stacked is None or self.kernels is None or are_adapted:
            return super().project_context(context)
        tokens, stacked = self.to_cond_embed(context.to(self.dtype)), self._stacked
        attention = self.transformer.typed_layers[0].cross_attn
        num_layers, num_heads, width = len(stacked.to_kv), attention.num_key_heads, attention.head_width
        parts = F.linear(tokens, stacked.to_kv.flatten(0, 1)).unflatten(-1, (num_layers, -1, num_heads, width))
        num_sets = parts.shape[3] - 1  # sets of keys: two in differential attention
        out = parts.new_empty(len(tokens), num_layers, 2, num_sets, num_heads, tokens.shape[1], width)
        keys, values = out.permute(2, 0, 5, 1, 3, 4, 6).unbind(0)  # (rows, tokens, layers, sets, heads, head width)
        # The values are normalised as well, because selecting the keys would need a copy.
        normed = self.kernels.normed_heads(parts.flatten(3, 4), gamma=stacked.key_gain, eps=stacked.key_eps)
        keys.copy_(normed.view(parts.shape)[:, :, :, :-1])
        values.copy_(parts[:, :, :, -1:].expand_as(values))
        return out.flatten(3, 4)

    def _embed_local(self, frames: Tensor) -> Tensor:
        """Returns all layers' local conditioning (rows, layers, frames, width) of (rows, frames, local width)."""
        layers = self.transformer.typed_layers
        local = None if self._stacked is None else self._stacked.local
        are_adapted = any(is_adapted(layer.to_local_embed) for layer in layers)
        # Only one frame is embedded unless a clip is edited. For many frames, the kernels take longer than their start.
        if local is None or self.kernels is None or are_adapted or frames.shape[1] > 1:
            return torch.stack([layer.to_local_embed(frames) for layer in layers], dim=1)
        first_weight, first_bias, last_weight, last_bias = local
        x = frames.flatten(0, 1).expand(len(layers), -1, -1)  # (layers, rows, local width)
        hidden = F.silu(torch.baddbmm(first_bias, x, first_weight.mT))
        return torch.baddbmm(last_bias, hidden, last_weight.mT).transpose(0, 1)[:, :, None].contiguous()

    def embed_time(self, t: Tensor) -> Tensor:
        if self.config.time_logsnr:
            t = (5 - torch.log((1 - t) / t).clamp(-12, 5)) / 17
        return super().embed_time(t)


def _stack(parameters: Sequence[Tensor]) -> Tensor:
    """Returns the parameters, stacked on axis 0, and makes them views of the result."""
    stacked = torch.stack([parameter.data for parameter in parameters])
    for parameter, own in zip(parameters, stacked, strict=True):
        parameter.data = own
    return stacked


def _stack_linear(layers: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Returns the stacked weights (layers, width out, width in) and biases (layers, 1, width out)."""
    return _stack([layer.weight for layer in layers]), _stack([layer.bias for layer in layers])[:, None]
