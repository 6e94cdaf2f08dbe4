"""The SAME encoder and decoder: transformers that change the time resolution by means of learned tokens.

A group is one latent and its `stride` frames. The encoder appends one learned token to the frames of a group; the
token's output is the latent. The decoder appends `stride` learned tokens to a latent; their outputs are the frames.
Module names are the checkpoint's keys below `encoder.` and `decoder.`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stable_audio_serve.models.blocks.attention import Attend, SelfAttention, attend
from stable_audio_serve.models.blocks.band import BandAttention
from stable_audio_serve.models.blocks.feedforward import FeedForward, add_branch, sine
from stable_audio_serve.models.blocks.fused import FusedModule
from stable_audio_serve.models.blocks.norms import DyT
from stable_audio_serve.models.blocks.rotary import HeadAffine, RotaryEmbedding, RotaryTable, cosines, gather_affine
from stable_audio_serve.models.config_reader import MAX_DEPTH, MAX_TOKENS, ConfigReader
from stable_audio_serve.models.parts import Noises, stack_draws


@dataclass(frozen=True, slots=True)
class SameConfig:
    """The dimensions of a SAME encoder or decoder.

    Attention uses sliding windows if `window_latents` is not None, else chunks of `chunk_frames`.
    """

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
        """The number of latents in a chunk, or 1 with sliding windows. Latents are padded to a multiple of it."""
        return 1 if self.window_latents is not None else self.chunk_frames // self.stride

    @property
    def halo_latents(self) -> int:
        """How many latents before and after a latent can influence its frames.

        With chunks, this is one chunk if chunks are shifted or if the convolution reads adjacent frames, else 0. With
        sliding windows, each layer adds `window_latents`, and the convolution adds 1.
        """
        convolves = self.mapping_kernel > 1
        if self.window_latents is None:
            return self.latent_multiple if self.midpoint_shift or convolves else 0
        return self.depth * self.window_latents + convolves


def parse_same(config: ConfigReader, *, channels_key: str) -> SameConfig:
    """Parse an encoder's or decoder's config section. Raises CheckpointError naming the key that cannot be used."""
    config.require(dyt=True, conformer=False, layer_scale=False, soft_clip=False)
    config.require(feat_scale=False, cross_attn=False, mapping_bias=True)
    strides, mults = config.integers("strides"), config.integers("c_mults")
    depths = config.integers("transformer_depths", at_most=MAX_DEPTH)
    for key, values in (("strides", strides), ("transformer_depths", depths), ("c_mults", mults)):
        if len(values) != 1:
            raise config.unusable(key, "a list of one number: stacked resampling blocks are not supported")
    stride, chunk_frames = strides[0], config.integer("chunk_size", default=128, at_most=MAX_TOKENS)
    width = config.integer("channels") * mults[0]
    head_width = min(config.integer("dim_heads", default=128), width)
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
    """Returns how many layers, counted from the last, use a sine as activation: `sinusoidal_blocks` minus 1.

    The reference implementation also subtracts 1.
    """
    if "sinusoidal_blocks" not in config:
        return 0
    blocks = config.integers("sinusoidal_blocks", at_least=0)
    if len(blocks) > 1:
        raise config.unusable("sinusoidal_blocks", "a list of one number: stacked resampling blocks are not supported")
    return min(max(blocks[0] - 1, 0), depth) if blocks else 0


class WeightNormConv(nn.Module):
    """A 1-D convolution with zero "same" padding and weight `g v / |v|`, where |v| is the norm per output channel."""

    def __init__(self, channels_in: int, channels_out: int, *, kernel: int) -> None:
        super().__init__()
        std = (channels_in * kernel) ** -0.5
        self.weight_v = nn.Parameter(torch.empty(channels_out, channels_in, kernel).normal_(std=std))
        self.weight_g = nn.Parameter(torch.ones(channels_out, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels_out))
        self._kernel: Tensor | None = None

    def resolve(self) -> None:
        """Compute and cache the kernel, which every call would otherwise compute."""
        self._kernel = self.kernel()

    def kernel(self) -> Tensor:
        """Returns the kernel computed from `weight_g` and `weight_v`."""
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=(1, 2), keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels in, length) -> (batch, channels out, length)."""
        kernel = self.kernel() if self._kernel is None else self._kernel
        return F.conv1d(x, kernel.to(x.dtype), self.bias, padding=kernel.shape[-1] // 2)


def _build_mapping(channels_in: int, channels_out: int, *, kernel: int) -> nn.Module:
    """Returns the convolution between frames and tokens. Checkpoints have none if both have equally many channels."""
    return nn.Identity() if channels_in == channels_out else WeightNormConv(channels_in, channels_out, kernel=kernel)


class SameLayer(FusedModule):
    """A transformer layer: self-attention and a feed-forward network, each after a DyT norm."""

    def __init__(self, config: SameConfig, *, uses_sine: bool) -> None:
        super().__init__()
        width = config.width
        heads = width // config.head_width
        self.pre_norm = DyT(width)
        self.self_attn = SelfAttention(width, num_heads=heads, differential=config.differential, head_norm="dyt")
        self.ff_norm = DyT(width)
        self.ff = FeedForward(width, mult=config.ff_mult, activation=sine if uses_sine else F.silu)
        self.rope = RotaryEmbedding(config.head_width // 2)

    def fold_norms(self) -> None:
        """Move the norms' gain and bias into the linear layers after them, which saves two kernel launches per call."""
        self.pre_norm.fold_into(self.self_attn.to_qkv)
        self.ff_norm.fold_into(self.ff.first)

    def forward(self, x: Tensor, *, rotary: RotaryTable, attend_fn: Attend, radius: int) -> Tensor:
        """(batch, tokens, width) -> (batch, tokens, width). `rotary` is this layer's rotary table.

        `attend_fn` lets a query see the keys that are at most `radius` tokens away. If gradients are disabled, may
        overwrite x, so callers must not use x afterwards.
        """
        attended = self.self_attn(self.pre_norm(x), rotary=rotary, attend_fn=attend_fn, radius=radius)
        x, normed = self.ff_norm.after_adding(x, attended)
        branch = self.ff(normed)
        if self.kernels is None or torch.is_grad_enabled():
            return add_branch(x, branch)
        return self.kernels.add(x, branch)


class ResamplingBlock(nn.Module):
    """What encoder and decoder share: the convolution over frames, the learned tokens and the transformer."""

    def __init__(self, config: SameConfig, *, mapping: nn.Module, num_tokens: int) -> None:
        super().__init__()
        self.config = config
        self.num_tokens = num_tokens
        stored = 1 if config.shared_token else num_tokens
        self.new_tokens = nn.Parameter(torch.empty(1, stored, config.width).normal_(std=config.width**-0.5))
        first_sine = config.depth - config.num_sine_layers
        self.transformers = nn.ModuleList(
            SameLayer(config, uses_sine=index >= first_sine) for index in range(config.depth)
        )
        self.mapping = mapping
        self._rotary: _Rotary | None = None
        self._chunk_table: RotaryTable | None = None

    def resolve(self) -> None:
        """Cache values derived from the weights, which every call would otherwise compute."""
        if isinstance(self.mapping, WeightNormConv):
            self.mapping.resolve()
        # On a CPU the weights are not changed, because processes share the memory of the mapped weight file.
        if self.new_tokens.device.type != "cpu":
            for layer in self._typed_layers:
                layer.fold_norms()
        self._rotary = self._gather_rotary()
        if self.config.window_latents is None:
            self._chunk_table = self._rotary.all_layers(self._chunk_tokens)

    def learned_tokens(self, num_windows: int, num_latents: int, *, noise: Noises) -> Tensor:
        """Returns the learned tokens of all groups, (windows * latents, tokens per group, width).

        If `mask_noise` in the config is not 0, `noise` scaled by it is added to each token, also at inference.
        """
        tokens = self.new_tokens.expand(num_windows * num_latents, self.num_tokens, -1)
        if noise is None or not self.config.mask_noise:
            return tokens
        shape = (num_latents, self.num_tokens, self.config.width)
        drawn = stack_draws(noise, "tokens", shape=shape, frame_axis=0, device=tokens.device).flatten(0, 1)
        return torch.add(tokens, drawn.to(tokens.dtype), alpha=self.config.mask_noise)

    def transform(self, groups: Tensor, num_windows: int) -> Tensor:
        """Run the layers over groups (windows * latents, stride + 1, width), which must be contiguous.

        With fused kernels, overwrites the groups. Returns (windows, latents, stride + 1, width).
        """
        x = groups.reshape(num_windows, -1, groups.shape[2])
        x = self._transform_chunks(x) if self.config.window_latents is None else self._transform_sliding(x)
        return x.unflatten(1, (-1, groups.shape[1]))

    @property
    def _typed_layers(self) -> list[SameLayer]:
        return [layer for layer in self.transformers if isinstance(layer, SameLayer)]

    @property
    def _chunk_tokens(self) -> int:
        return self.config.latent_multiple * (self.config.stride + 1)

    def _transform_sliding(self, x: Tensor) -> Tensor:
        assert self.config.window_latents is not None
        radius = self.config.window_latents * (self.config.stride + 1)
        band = BandAttention(*x.shape[:2], radius=radius)
        positions = _positions(x.shape[1], x.device)
        affine, rates = self._rotary or self._gather_rotary()
        cos, sin = cosines(positions, rates)
        for index, layer in enumerate(self.transformers):
            # Build the rotary table of one layer at a time, because the tables of all layers need much memory.
            table = affine.layer(index).fold(cos[index], sin[index])
            x = layer(x, rotary=table, attend_fn=band, radius=radius)
        return x

    def _transform_chunks(self, x: Tensor) -> Tensor:
        """Run all layers with attention within chunks of tokens.

        If the config has `midpoint_shift`, the second half of the layers uses chunks shifted by half a chunk. For these
        layers, a copy of the first half chunk is put before the sequence and a copy of the last one after it. Both are
        dropped from the result.
        """
        half = self._chunk_tokens // 2
        middle = len(self.transformers) // 2 if self.config.midpoint_shift else len(self.transformers)
        table = self._chunk_table or self._gather_rotary().all_layers(self._chunk_tokens)
        x = self._run_chunked(x, table, layers=range(middle))
        if middle == len(self.transformers):
            return x
        x = torch.cat([x[:, :half], x, x[:, -half:]], dim=1)
        return self._run_chunked(x, table, layers=range(middle, len(self.transformers)))[:, half:-half]

    def _run_chunked(self, x: Tensor, table: RotaryTable, *, layers: Iterable[int]) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, self._chunk_tokens, shape[2])
        for index in layers:
            x = self.transformers[index](x, rotary=table.layer(index), attend_fn=attend, radius=self._chunk_tokens)
        return x.reshape(shape)

    def _gather_rotary(self) -> _Rotary:
        layers = self._typed_layers
        norms = [(layer.self_attn.q_norm, layer.self_attn.k_norm) for layer in layers]
        rates = torch.stack([layer.rope.rates(self.config.head_width) for layer in layers])
        return _Rotary(gather_affine(norms, half=layers[0].rope.half_width), rates)


class _Rotary(NamedTuple):
    """The gains and biases of all layers' query and key norms, and all layers' rotary rates (layers, head width)."""

    affine: HeadAffine
    rates: Tensor

    def all_layers(self, num_positions: int) -> RotaryTable:
        return self.affine.table(_positions(num_positions, self.rates.device), rates=self.rates)


def _positions(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device, dtype=torch.float32)


class SameEncoder(nn.Module):
    """Encodes frames (batch, frame channels, frames) to raw latents (batch, latent channels, latent frames)."""

    def __init__(self, config: SameConfig) -> None:
        super().__init__()
        self.frames_per_latent = config.stride
        self.latent_multiple = config.latent_multiple
        self.noisy = config.mask_noise > 0
        mapping = _build_mapping(config.frame_channels, config.width, kernel=config.mapping_kernel)
        block = ResamplingBlock(config, mapping=mapping, num_tokens=1)
        self.layers = nn.ModuleDict({"0": block, "2": nn.Linear(config.width, config.latent_channels)})

    def forward(self, frames: Tensor, noise: Noises) -> Tensor:
        """Returns raw latents. There may be more than frames / stride, because frames are padded to whole chunks."""
        block, out = self.layers["0"], self.layers["2"]
        assert isinstance(block, ResamplingBlock)
        stride = self.frames_per_latent
        frames = F.pad(frames, (0, -frames.shape[-1] % (stride * self.latent_multiple)))
        num_windows, num_latents = len(frames), frames.shape[-1] // stride
        mapped = block.mapping(frames).transpose(1, 2).reshape(num_windows * num_latents, stride, -1)
        groups = torch.cat([mapped, block.learned_tokens(num_windows, num_latents, noise=noise)], dim=1)
        return out(block.transform(groups, num_windows)[:, :, -1]).transpose(1, 2)


class SameDecoder(nn.Module):
    """Decodes latents (batch, latent channels, latent frames) to frames (batch, frame channels, frames)."""

    def __init__(self, config: SameConfig) -> None:
        super().__init__()
        self.frames_per_latent = config.stride
        self.latent_multiple = config.latent_multiple
        self.halo_latents = config.halo_latents
        mapping = _build_mapping(config.width, config.frame_channels, kernel=config.mapping_kernel)
        block = ResamplingBlock(config, mapping=mapping, num_tokens=config.stride)
        self.layers = nn.ModuleDict({"1": nn.Linear(config.latent_channels, config.width), "3": block})

    def forward(self, latents: Tensor, noise: Noises) -> Tensor:
        """Returns frames. There may be more than latents * stride.

        The reason is padding: after the first linear layer, zeros extend the latents to a multiple of
        `latent_multiple`.
        """
        first, block = self.layers["1"], self.layers["3"]
        assert isinstance(block, ResamplingBlock)
        embedded = first(latents.transpose(1, 2))
        if num_missing := -latents.shape[-1] % self.latent_multiple:
            embedded = F.pad(embedded, (0, 0, 0, num_missing))
        num_windows, num_latents, width = embedded.shape
        leading = embedded.reshape(num_windows * num_latents, 1, width)
        groups = torch.cat([leading, block.learned_tokens(num_windows, num_latents, noise=noise)], dim=1)
        kept = block.transform(groups, num_windows)[:, :, 1:].flatten(1, 2)
        return block.mapping(kept.transpose(1, 2))


def build_encoder(config: ConfigReader) -> SameEncoder:
    """Build the encoder from the `encoder.config` section of a checkpoint's config."""
    return SameEncoder(parse_same(config, channels_key="in_channels"))


def build_decoder(config: ConfigReader) -> SameDecoder:
    """Build the decoder from the `decoder.config` section of a checkpoint's config."""
    return SameDecoder(parse_same(config, channels_key="out_channels"))
