"""Reads the dimensions of a SAME encoder or decoder from its config section."""

from __future__ import annotations

from dataclasses import dataclass

from stable_audio_serve.models.config_reader import MAX_DEPTH, MAX_TOKENS, ConfigReader


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
    strides, mults = config.integers("strides"), config.integers("c_mults")
    depths = config.integers("transformer_depths", at_most=MAX_DEPTH)
    for key, values in (("strides", strides), ("transformer_depths", depths), ("c_mults", mults)):
        if len(values) != 1:
            raise config.unusable(key, "a list of one number: stacked resampling blocks are not supported")
    stride, chunk_frames = strides[0], config.integer("chunk_size", default=128, at_most=MAX_TOKENS)
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
    """Returns how many layers, counted from the last, use a sine as activation: `sinusoidal_blocks` minus 1.

    The reference implementation also subtracts 1.
    """
    if "sinusoidal_blocks" not in config:
        return 0
    blocks = config.integers("sinusoidal_blocks", at_least=0)
    if len(blocks) > 1:
        raise config.unusable("sinusoidal_blocks", "a list of one number: stacked resampling blocks are not supported")
    return min(max(blocks[0] - 1, 0), depth) if blocks else 0
