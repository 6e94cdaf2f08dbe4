"""The SAME encoder and decoder: one transformer that changes the time resolution by inserting learned tokens.

A group is one latent and the `stride` frames it stands for. The encoder appends one learned token to the frames of a
group and keeps that token's output; the decoder appends learned tokens to a latent and keeps their outputs.
Module names are the checkpoint's keys below `encoder.` and `decoder.`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stable_audio_serve.models.blocks import (
    Attend,
    DyT,
    FeedForward,
    RotaryEmbedding,
    SelfAttention,
    attend,
    attend_band,
    sine,
)
from stable_audio_serve.models.config_reader import MAX_DEPTH, ConfigReader
from stable_audio_serve.models.parts import Noises, register_part, stack_draws


@dataclass(frozen=True, slots=True)
class SameConfig:
    """Shape of one half. `window_latents` is set for sliding-window attention, otherwise chunks of `chunk_frames`."""

    frame_channels: int
    latent_channels: int
    width: int
    depth: int
    head_width: int
    stride: int
    differential: bool
    ff_mult: float
    mapping_kernel: int
    mask_noise: float
    shared_token: bool
    num_sine_layers: int
    window_latents: int | None
    chunk_frames: int
    midpoint_shift: bool

    @property
    def latent_multiple(self) -> int:
        """Latents are padded to a multiple of this: a chunk, or one latent where windows slide."""
        return 1 if self.window_latents is not None else self.chunk_frames // self.stride

    @property
    def halo_latents(self) -> int:
        """Latents on each side that can influence a latent's frames, the mapping convolution included.

        Shifted chunks and the convolution reach into the neighbouring chunk; sliding windows reach one window per
        layer. The result is a multiple of `latent_multiple`, as the edges of windows must be.
        """
        convolves = self.mapping_kernel > 1
        if self.window_latents is None:
            return self.latent_multiple if self.midpoint_shift or convolves else 0
        return self.depth * self.window_latents + convolves


def parse_same(config: ConfigReader, *, channels_key: str) -> SameConfig:
    """Parse an encoder's or decoder's config section. Raises CheckpointError naming the key that cannot be used."""
    config.require(dyt=True, conformer=False, layer_scale=False, soft_clip=False)
    strides, mults = config.integers("strides"), config.integers("c_mults")
    depths = config.integers("transformer_depths", at_most=MAX_DEPTH)
    for key, values in (("strides", strides), ("transformer_depths", depths), ("c_mults", mults)):
        if len(values) != 1:
            raise config.unusable(key, "a list of one number: stacked resampling blocks are not supported")
    stride, chunk_frames = strides[0], config.integer("chunk_size", default=128)
    width, head_width = config.integer("channels") * mults[0], config.integer("dim_heads", default=128)
    if width % head_width or head_width % 4:
        raise config.unusable("dim_heads", f"a multiple of 4 that divides the width ({width})")
    window, shifted = None, config.flag("chunk_midpoint_shift", default=False)
    if "sliding_window" in config:
        sides = config.integers("sliding_window", at_least=0)
        if len(sides) != 2 or sides[0] != sides[1]:
            raise config.unusable("sliding_window", "two equal numbers of latents")
        window = sides[0]
    elif chunk_frames % stride:
        raise config.unusable("chunk_size", f"a multiple of the stride ({stride})")
    elif shifted and (stride + 1) * (chunk_frames // stride) % 2:
        raise config.unusable("chunk_size", "an even number of tokens, to be shifted by half of them")
    return SameConfig(
        frame_channels=config.integer(channels_key),
        latent_channels=config.integer("latent_dim"),
        width=width,
        depth=depths[0],
        head_width=head_width,
        stride=stride,
        differential=config.flag("differential", default=True),
        ff_mult=config.number("ff_mult", default=3, at_least=0.01),
        mapping_kernel=3 if config.flag("conv_mapping", default=False) else 1,
        mask_noise=config.number("mask_noise", default=0.0, at_least=0),
        shared_token=config.flag("variable_stride", default=False),
        num_sine_layers=_sine_layers(config, depths[0]),
        window_latents=window,
        chunk_frames=chunk_frames,
        midpoint_shift=shifted,
    )


def _sine_layers(config: ConfigReader, depth: int) -> int:
    """Layer j of n uses the sine where n - j < sinusoidal_blocks: one layer fewer than the key says."""
    if "sinusoidal_blocks" not in config:
        return 0
    blocks = config.integers("sinusoidal_blocks", at_least=0)
    if len(blocks) > 1:
        raise config.unusable("sinusoidal_blocks", "a list of one number: stacked resampling blocks are not supported")
    return min(max(blocks[0] - 1, 0), depth) if blocks else 0


class WeightNormConv(nn.Module):
    """1-D convolution with zero "same" padding whose weight is `g v / |v|`, the norm taken per output channel."""

    def __init__(self, channels_in: int, channels_out: int, *, kernel: int) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.randn(channels_out, channels_in, kernel) / (channels_in * kernel) ** 0.5)
        self.weight_g = nn.Parameter(torch.ones(channels_out, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels in, N) -> (B, channels out, N)."""
        norm = self.weight_v.norm(dim=(1, 2), keepdim=True)
        weight = self.weight_v * (self.weight_g / norm)
        return F.conv1d(x, weight, self.bias, padding=weight.shape[-1] // 2)


class SameLayer(nn.Module):
    """Self-attention and feed-forward, each behind a DyT."""

    def __init__(self, config: SameConfig, *, uses_sine: bool) -> None:
        super().__init__()
        width = config.width
        heads = width // config.head_width
        self.pre_norm = DyT(width)
        self.self_attn = SelfAttention(width, num_heads=heads, differential=config.differential, head_norm="dyt")
        self.ff_norm = DyT(width)
        self.ff = FeedForward(width, mult=config.ff_mult, activation=sine if uses_sine else F.silu)
        self.rope = RotaryEmbedding(config.head_width // 2)

    def forward(self, x: Tensor, attend_fn: Attend) -> Tensor:
        """(B, N, width) -> (B, N, width); positions count from 0."""
        x = x + self.self_attn(self.pre_norm(x), rotary=self.rope(x.shape[1]), attend_fn=attend_fn)
        return x + self.ff(self.ff_norm(x))


class ResamplingBlock(nn.Module):
    """The mapping between frame channels and width, the learned tokens and the transformer."""

    def __init__(self, config: SameConfig, *, mapping: WeightNormConv, num_tokens: int) -> None:
        super().__init__()
        self.config = config
        self.num_tokens = num_tokens
        stored = 1 if config.shared_token else num_tokens
        self.new_tokens = nn.Parameter(torch.randn(1, stored, config.width) / config.width**0.5)
        first_sine = config.depth - config.num_sine_layers
        self.transformers = nn.ModuleList(
            SameLayer(config, uses_sine=index >= first_sine) for index in range(config.depth)
        )
        self.mapping = mapping

    def learned_tokens(self, num_windows: int, num_latents: int, *, noise: Noises) -> Tensor:
        """Returns tokens to insert, (B * F, num_tokens, width); `noise` is added to each, also at inference."""
        tokens = self.new_tokens.expand(num_windows * num_latents, self.num_tokens, -1)
        if noise is None or not self.config.mask_noise:
            return tokens
        shape = (num_latents, self.num_tokens, self.config.width)
        drawn = stack_draws(noise, "tokens", shape=shape, frame_axis=0, device=tokens.device).flatten(0, 1)
        return tokens + self.config.mask_noise * drawn.to(tokens.dtype)

    def transform(self, groups: Tensor, num_windows: int) -> Tensor:
        """Run the layers over groups (B * F, stride + 1, width). Returns the same shape."""
        group_size = groups.shape[1]
        x = groups.reshape(num_windows, -1, groups.shape[2])
        if self.config.window_latents is None:
            x = self._transform_chunks(x, chunk=self.config.latent_multiple * group_size)
        else:
            for layer in self.transformers:
                x = layer(x, partial(attend_band, radius=self.config.window_latents * group_size))
        return x.reshape(groups.shape)

    def _transform_chunks(self, x: Tensor, *, chunk: int) -> Tensor:
        """Attention inside chunks of tokens; the later half of the layers sees chunks shifted by half of one.

        For the shift the sequence is lengthened at both ends by copies of its own half chunks, dropped afterwards.
        """
        half = chunk // 2
        middle = len(self.transformers) // 2 if self.config.midpoint_shift else len(self.transformers)
        x = self._run_chunked(x, chunk=chunk, first=0, last=middle)
        if middle == len(self.transformers):
            return x
        x = torch.cat([x[:, :half], x, x[:, -half:]], dim=1)
        return self._run_chunked(x, chunk=chunk, first=middle, last=len(self.transformers))[:, half:-half]

    def _run_chunked(self, x: Tensor, *, chunk: int, first: int, last: int) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, chunk, shape[2])
        for layer in self.transformers[first:last]:
            x = layer(x, attend)
        return x.reshape(shape)


class SameEncoder(nn.Module):
    """Frames (B, P, N) to raw latents (B, D, F)."""

    def __init__(self, config: SameConfig) -> None:
        super().__init__()
        self.frames_per_latent = config.stride
        self.latent_multiple = config.latent_multiple
        self.noisy = config.mask_noise > 0
        mapping = WeightNormConv(config.frame_channels, config.width, kernel=config.mapping_kernel)
        block = ResamplingBlock(config, mapping=mapping, num_tokens=1)
        self.layers = nn.ModuleDict({"0": block, "2": nn.Linear(config.width, config.latent_channels)})

    def forward(self, frames: Tensor, noise: Noises) -> Tensor:
        """N is zero-padded at the end to whole chunks of latents, before the mapping."""
        block, out = self.layers["0"], self.layers["2"]
        assert isinstance(block, ResamplingBlock)
        stride = self.frames_per_latent
        frames = F.pad(frames, (0, -frames.shape[-1] % (stride * self.latent_multiple)))
        num_windows, num_latents = len(frames), frames.shape[-1] // stride
        mapped = block.mapping(frames).transpose(1, 2).reshape(num_windows * num_latents, stride, -1)
        groups = torch.cat([mapped, block.learned_tokens(num_windows, num_latents, noise=noise)], dim=1)
        kept = block.transform(groups, num_windows)[:, -1]
        return out(kept.reshape(num_windows, num_latents, -1)).transpose(1, 2)


class SameDecoder(nn.Module):
    """Latents (B, D, F), out of the bottleneck, to frames (B, P, N)."""

    def __init__(self, config: SameConfig) -> None:
        super().__init__()
        self.frames_per_latent = config.stride
        self.latent_multiple = config.latent_multiple
        self.halo_latents = config.halo_latents
        mapping = WeightNormConv(config.width, config.frame_channels, kernel=config.mapping_kernel)
        block = ResamplingBlock(config, mapping=mapping, num_tokens=config.stride)
        self.layers = nn.ModuleDict({"1": nn.Linear(config.latent_channels, config.width), "3": block})

    def forward(self, latents: Tensor, noise: Noises) -> Tensor:
        """F is zero-padded, after the first projection, to a multiple of `latent_multiple`, so the result may be
        longer than F."""
        first, block = self.layers["1"], self.layers["3"]
        assert isinstance(block, ResamplingBlock)
        embedded = F.pad(first(latents.transpose(1, 2)), (0, 0, 0, -latents.shape[-1] % self.latent_multiple))
        num_windows, num_latents, width = embedded.shape
        leading = embedded.reshape(num_windows * num_latents, 1, width)
        groups = torch.cat([leading, block.learned_tokens(num_windows, num_latents, noise=noise)], dim=1)
        kept = block.transform(groups, num_windows)[:, 1:]
        return block.mapping(kept.reshape(num_windows, -1, width).transpose(1, 2))


@register_part("encoder", "same", "taae_v2")
def build_encoder(config: ConfigReader) -> SameEncoder:
    """From the `encoder.config` section."""
    return SameEncoder(parse_same(config, channels_key="in_channels"))


@register_part("decoder", "same", "taae_v2")
def build_decoder(config: ConfigReader) -> SameDecoder:
    """From the `decoder.config` section."""
    return SameDecoder(parse_same(config, channels_key="out_channels"))
