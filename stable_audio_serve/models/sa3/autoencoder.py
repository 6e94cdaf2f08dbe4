"""An audio autoencoder built from its parts: pretransform, encoder, bottleneck, decoder.

Works on windows of latents, which the caller cuts and joins. Draws no random numbers: callers pass in all noise. Module
names are the checkpoint's keys below `pretransform.model.`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.parts import (
    Bottleneck,
    Decoder,
    Encoder,
    Noises,
    Pretransform,
    build_part,
    register_part,
    stack_draws,
)
from stable_audio_serve.models.precision import Products
from stable_audio_serve.models.sa3 import same

PART_MODULES = (same,)  # imported so that its types are registered
REGULARIZATION = 1e-3


class Patched(nn.Module):
    """Cuts audio into patches: frame channel `c * patch + h` is sample h of channel c in the patch. No weights."""

    halo_frames = 0
    is_placed = False

    def __init__(self, channels: int, patch: int) -> None:
        super().__init__()
        self.channels = channels
        self.samples_per_frame = patch

    def encode(self, audio: Tensor) -> Tensor:
        """Audio (B, C, S) -> frames (B, C * patch, ceil(S / patch)); the end is padded with zeros."""
        patch = self.samples_per_frame
        padded = F.pad(audio, (0, -audio.shape[-1] % patch))
        return padded.unflatten(-1, (-1, patch)).transpose(2, 3).flatten(1, 2)

    def decode(self, frames: Tensor, noise: Noises) -> Tensor:
        """Frames (B, C * patch, N) -> audio (B, C, N * patch)."""
        return frames.unflatten(1, (self.channels, self.samples_per_frame)).transpose(2, 3).flatten(2)


class SoftNorm(nn.Module):
    """Encoding scales and shifts each latent channel and divides by one deviation for all channels.

    Decoding multiplies by the deviation but does not invert scale and bias. If `regularized`, decoding first adds faint
    noise, at inference too.
    """

    def __init__(self, channels: int, *, regularized: bool) -> None:
        super().__init__()
        self.regularized = regularized
        self.scaling_factor = nn.Parameter(torch.ones(1, channels, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1))
        self.running_std = nn.Parameter(torch.ones(1))
        self.noise_scaling_factor = nn.Parameter(torch.zeros(1, 0, 1))  # empty in the files

    def encode(self, raw: Tensor) -> Tensor:
        """(B, D, F) -> (B, D, F)."""
        return (raw * self.scaling_factor + self.bias) / self.running_std

    def decode(self, latents: Tensor, noise: Noises) -> Tensor:
        """(B, D, F) -> (B, D, F)."""
        if noise is not None and self.regularized:
            shape = (latents.shape[1], latents.shape[2])
            drawn = stack_draws(noise, "bottleneck", shape=shape, frame_axis=1, device=latents.device)
            latents = torch.add(latents, drawn.to(latents.dtype), alpha=REGULARIZATION)
        return latents * self.running_std


class AudioAutoencoder(nn.Module):
    """Audio (B, C, S) to latents (B, D, F) and back; `hop` samples per latent frame."""

    def __init__(self, config: ConfigReader) -> None:
        """`config` is the autoencoder's section. Raises CheckpointError naming the key that cannot be used."""
        super().__init__()
        self.pretransform = cast("Pretransform", build_part("pretransform", config.section("pretransform")))
        self.encoder = cast("Encoder", build_part("encoder", config.section("encoder")))
        self.decoder = cast("Decoder", build_part("decoder", config.section("decoder")))
        self.bottleneck = cast("Bottleneck", build_part("bottleneck", config.section("bottleneck")))
        config.require(soft_clip=False)
        self.channels = config.integer("io_channels", default=2)
        self.latent_channels = config.integer("latent_dim")
        self.hop = config.integer("downsampling_ratio")
        for part in (self.encoder, self.decoder):
            made = self.pretransform.samples_per_frame * part.frames_per_latent
            if made != self.hop:
                raise config.unusable("downsampling_ratio", f"patch times stride ({made})")

    @property
    def encoder_draws_noise(self) -> bool:
        """Whether encoding draws noise, so that rows cannot share the encoding of a clip."""
        return self.encoder.noisy

    @property
    def decoder_halo_latents(self) -> int:
        """Latents on each side that can influence a latent's audio, rounded up to multiples of `latent_multiple`."""
        reach = self.decoder.halo_latents + -(-self.pretransform.halo_frames // self.decoder.frames_per_latent)
        return -(-reach // self.latent_multiple) * self.latent_multiple

    @property
    def latent_multiple(self) -> int:
        """Windows must start at a multiple of this number of latents."""
        return max(self.encoder.latent_multiple, self.decoder.latent_multiple)

    def resolve(self) -> None:
        """Cache values derived from the weights, which every call would otherwise compute.

        Call it after the weights are loaded and moved to their device.
        """
        for module in self.modules():
            if isinstance(module, same.ResamplingBlock):
                module.resolve()

    def encode(self, audio: Tensor, noise: Noises = None) -> Tensor:
        """Returns latents (B, D, F) of audio (B, C, S), F at least S / hop rounded up; row-independent."""
        return self.bottleneck.encode(self.encoder(self.pretransform.encode(audio), noise))

    def decode(self, latents: Tensor, noise: Noises = None, *, products: Products = nullcontext) -> Tensor:
        """Returns audio (B, C, at least F * hop) of latents (B, D, F), not clamped; row-independent.

        Only the decoder runs within the context `products()`.
        """
        scaled = self.bottleneck.decode(latents, noise)
        with products():
            frames = self.decoder(scaled, noise)
        return self.pretransform.decode(frames.float(), noise)


@register_part("pretransform", "patched")
def build_patched(config: ConfigReader) -> Patched:
    """Build from the innermost `pretransform.config` section."""
    config.require(oversampling=1)
    return Patched(config.integer("channels"), config.integer("patch_size"))


@register_part("bottleneck", "softnorm")
def build_softnorm(config: ConfigReader) -> SoftNorm:
    """Build from the `bottleneck.config` section."""
    if config.integer("noise_augment_dim", default=0, at_least=0):
        raise config.unusable("noise_augment_dim", "0")
    return SoftNorm(config.integer("dim"), regularized=config.flag("noise_regularize", default=False))
