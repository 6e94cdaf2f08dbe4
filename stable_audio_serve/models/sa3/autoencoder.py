"""An audio autoencoder built from four parts: pretransform, encoder, bottleneck, decoder.

It processes windows of a clip; the caller cuts and joins them. It draws no random numbers: callers pass in all noise.
Module names are the checkpoint's keys below `pretransform.model.`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.oscillator import parts as oscillator
from stable_audio_serve.models.parts import (
    Decoder,
    Encoder,
    Noises,
    Pretransform,
    stack_draws,
)
from stable_audio_serve.models.precision import Products
from stable_audio_serve.models.sa3 import same

REGULARIZATION = 1e-3

_Part = TypeVar("_Part")
_Builders = Mapping[str, Callable[[ConfigReader], _Part]]


class Patched(nn.Module):
    """Reshapes audio to frames of `patch` samples: sample h of channel c becomes frame channel `c * patch + h`."""

    halo_frames = 0
    is_placed = False

    def __init__(self, channels: int, patch: int) -> None:
        super().__init__()
        self.channels = channels
        self.samples_per_frame = patch

    def encode(self, audio: Tensor) -> Tensor:
        """Audio (batch, channels, samples) -> frames (batch, channels * patch, ceil(samples / patch)).

        The audio's end is padded with zeros.
        """
        patch = self.samples_per_frame
        padded = F.pad(audio, (0, -audio.shape[-1] % patch))
        return padded.unflatten(-1, (-1, patch)).transpose(2, 3).flatten(1, 2)

    def decode(self, frames: Tensor, noise: Noises) -> Tensor:
        """Frames (batch, channels * patch, frames) -> audio (batch, channels, frames * patch)."""
        return frames.unflatten(1, (self.channels, self.samples_per_frame)).transpose(2, 3).flatten(2)


class SoftNorm(nn.Module):
    """A bottleneck. Encoding scales and shifts each latent channel. If `rescaled`, it then divides all channels by one
    standard deviation.

    Decoding multiplies by the standard deviation but does not undo the scale and the shift. If `regularized`, decoding
    first adds weak noise, also at inference.
    """

    running_std: Tensor | None

    def __init__(self, channels: int, *, rescaled: bool, regularized: bool) -> None:
        super().__init__()
        self.regularized = regularized
        self.scaling_factor = nn.Parameter(torch.ones(1, channels, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1))
        self.register_parameter("running_std", nn.Parameter(torch.ones(1)) if rescaled else None)
        self.noise_scaling_factor = nn.Parameter(torch.zeros(1, 0, 1))  # unused, but a key of the checkpoints

    def encode(self, raw: Tensor) -> Tensor:
        """Raw latents (batch, latent channels, latent frames) -> latents of the same shape."""
        latents = raw * self.scaling_factor + self.bias
        return latents if self.running_std is None else latents / self.running_std

    def decode(self, latents: Tensor, noise: Noises) -> Tensor:
        """Latents (batch, latent channels, latent frames) -> the decoder's input, of the same shape."""
        if noise is not None and self.regularized:
            shape = (latents.shape[1], latents.shape[2])
            drawn = stack_draws(noise, "bottleneck", shape=shape, frame_axis=1, device=latents.device)
            latents = torch.add(latents, drawn.to(latents.dtype), alpha=REGULARIZATION)
        return latents if self.running_std is None else latents * self.running_std


class AudioAutoencoder(nn.Module):
    """Converts audio (batch, channels, samples) to latents (batch, latent channels, latent frames) and back.

    There are `hop` samples per latent frame.
    """

    def __init__(self, config: ConfigReader) -> None:
        """`config` is the autoencoder's section. Raises CheckpointError naming the key that cannot be used."""
        super().__init__()
        self.pretransform = _build(_PRETRANSFORMS, config.section("pretransform"))
        self.encoder = _build(_ENCODERS, config.section("encoder"))
        self.decoder = _build(_DECODERS, config.section("decoder"))
        self.bottleneck = build_softnorm(config.section("bottleneck"))
        for section in (config, config.section("decoder")):
            section.require(soft_clip=False)
        self.channels = config.integer("io_channels", default=2)
        for key in ("in_channels", "out_channels"):
            if config.integer(key, default=self.channels) != self.channels:
                raise config.unusable(key, f"io_channels ({self.channels})")
        self.latent_channels = config.integer("latent_dim")
        self.hop = config.integer("downsampling_ratio")
        for part in (self.encoder, self.decoder):
            made = self.pretransform.samples_per_frame * part.frames_per_latent
            if made != self.hop:
                raise config.unusable("downsampling_ratio", f"patch times stride ({made})")

    @property
    def decoder_halo_latents(self) -> int:
        """How many latents on each side influence a latent's audio, rounded up to a multiple of `latent_multiple`."""
        reach = self.decoder.halo_latents + -(-self.pretransform.halo_frames // self.decoder.frames_per_latent)
        return -(-reach // self.latent_multiple) * self.latent_multiple

    @property
    def latent_multiple(self) -> int:
        """Windows for decoding must start at a multiple of this number of latents."""
        return self.decoder.latent_multiple

    def resolve(self) -> None:
        """Cache values that are derived from the weights, which every call would otherwise compute.

        Call it after the weights are loaded and on their device.
        """
        for module in self.modules():
            if isinstance(module, same.ResamplingBlock):
                module.resolve()

    def encode(self, audio: Tensor, noise: Noises = None) -> Tensor:
        """Returns latents (batch, latent channels, latent frames) of audio (batch, channels, samples).

        There are at least ceil(samples / hop) latent frames. Each batch row is encoded independently.
        """
        return self.bottleneck.encode(self.encoder(self.pretransform.encode(audio), noise))

    def decode(self, latents: Tensor, noise: Noises = None, *, products: Products = nullcontext) -> Tensor:
        """Returns audio (batch, channels, at least frames * hop) of latents (batch, latent channels, frames).

        The audio is not clamped to -1..1. Each batch row is decoded independently. `products()` is a context that sets
        the precision of matrix products; only the part `decoder` runs in it.
        """
        scaled = self.bottleneck.decode(latents, noise)
        with products():
            frames = self.decoder(scaled, noise)
        return self.pretransform.decode(frames.float(), noise)


def build_patched(config: ConfigReader) -> Patched:
    """Build the pretransform from the innermost `pretransform.config` section of a checkpoint's config."""
    config.require(oversampling=1, postfilter_channels=0)
    return Patched(config.integer("channels"), config.integer("patch_size"))


def build_softnorm(config: ConfigReader) -> SoftNorm:
    """Build the bottleneck from the `bottleneck` section of a checkpoint's config."""
    config.choice("type", ("softnorm",))
    config = config.section("config", optional=True)
    if config.integer("noise_augment_dim", default=0, at_least=0):
        raise config.unusable("noise_augment_dim", "0")
    rescaled, regularized = (config.flag(key, default=False) for key in ("auto_scale", "noise_regularize"))
    if regularized and not rescaled:  # the noise would depend on the whole clip, but clips are decoded in windows
        raise config.unusable("noise_regularize", "false without auto_scale")
    return SoftNorm(config.integer("dim"), rescaled=rescaled, regularized=regularized)


# The functions that build parts, by a part's `type`. They are called with the part's `config` section.
_PRETRANSFORMS: _Builders[Pretransform] = {
    "oscillator_bank": oscillator.build_oscillator_bank,
    "patched": build_patched,
}
_ENCODERS: _Builders[Encoder] = {
    "patch_mlp": oscillator.build_encoder,
    "same": same.build_encoder,
    "taae_v2": same.build_encoder,
}
_DECODERS: _Builders[Decoder] = {
    "patch_mlp": oscillator.build_decoder,
    "same": same.build_decoder,
    "taae_v2": same.build_decoder,
}


def _build(builders: _Builders[_Part], config: ConfigReader) -> _Part:
    """Build the part described by the keys `type` and `config`. Raises CheckpointError naming an unknown type."""
    build = builders[config.choice("type", tuple(builders))]
    return build(config.section("config", optional=True))
