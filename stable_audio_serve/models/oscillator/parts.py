"""Registers the demo model's autoencoder parts: pretransform `oscillator_bank`, encoder and decoder `patch_mlp`.

The modules `bank`, `analysis` and `patch_mlp` of this folder have the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.oscillator.analysis import analyse
from stable_audio_serve.models.oscillator.bank import FRAME_SAMPLES, OscillatorBank
from stable_audio_serve.models.oscillator.patch_mlp import PatchDecoder, PatchEncoder
from stable_audio_serve.models.parts import Noises, WindowNoise, register_part, stack_draws


class OscillatorBankPretransform(nn.Module):
    """Converts stereo audio to frames of the oscillator bank and back.

    Phases and noise depend on a frame's position in the clip, not in the window. Therefore the audio of a window, away
    from its edges, is the same as in the whole clip.
    """

    samples_per_frame = FRAME_SAMPLES
    halo_frames = OscillatorBank.halo_frames
    is_placed = True  # the phases depend on the window's start

    def __init__(self, *, frames_per_latent: int) -> None:
        super().__init__()
        self._frames_per_latent = frames_per_latent
        self._banks: dict[torch.device, OscillatorBank] = {}

    def encode(self, audio: Tensor) -> Tensor:
        """Returns the frames (batch, 222, ceil(samples / 512)) of audio (batch, 2, samples)."""
        return torch.stack([analyse(clip.float()) for clip in audio])

    def decode(self, frames: Tensor, noise: Noises) -> Tensor:
        """Returns audio (batch, 2, frames * 512) of frames (batch, 222, frames).

        If `noise` is None, the noise bands are silent.
        """
        bank = self._banks.get(frames.device) or self._banks.setdefault(frames.device, OscillatorBank(frames.device))
        batch, _, num_frames = frames.shape
        if noise is None:
            raw = frames.new_zeros(batch, 2, num_frames * FRAME_SAMPLES)
            starts = [0] * batch
        else:
            raw = self._draw(noise, num_frames, device=frames.device)
            starts = [window.start * self._frames_per_latent for window in noise]
        rows = zip(frames.float(), raw, starts, strict=True)
        return torch.stack([bank.render(row, drawn, start_frame=start) for row, drawn, start in rows])

    def _draw(self, noise: Sequence[WindowNoise], num_frames: int, *, device: torch.device) -> Tensor:
        """Returns noise (batch, 2, num_frames * 512), drawn separately for each latent frame."""
        samples = self._frames_per_latent * FRAME_SAMPLES
        shape = (-(-num_frames // self._frames_per_latent), 2, samples)
        drawn = stack_draws(noise, "noise bands", shape=shape, frame_axis=0, device=device)
        return drawn.transpose(1, 2).flatten(2)[..., : num_frames * FRAME_SAMPLES]


class PatchMlpEncoder(PatchEncoder):
    """`PatchEncoder` with the interface of an autoencoder's encoder (`parts.Encoder`)."""

    latent_multiple = 1
    noisy = False

    @property
    def frames_per_latent(self) -> int:
        return self.patch_frames

    def forward(self, frames: Tensor, noise: Noises = None) -> Tensor:
        """Frames (batch, channels, frames) -> latents (batch, latent channels, latent frames). `noise` is not used."""
        return super().forward(frames)


class PatchMlpDecoder(PatchDecoder):
    """`PatchDecoder` with the interface of an autoencoder's decoder (`parts.Decoder`)."""

    latent_multiple = 1
    halo_latents = 0

    @property
    def frames_per_latent(self) -> int:
        return self.patch_frames

    def forward(self, latents: Tensor, noise: Noises = None) -> Tensor:
        """Latents (batch, latent channels, latent frames) -> frames (batch, channels, frames). `noise` is not used."""
        return super().forward(latents)


@register_part("pretransform", "oscillator_bank")
def build_oscillator_bank(config: ConfigReader) -> OscillatorBankPretransform:
    """Build the pretransform from the innermost `pretransform.config` section of a checkpoint's config."""
    if config.integer("channels", default=2) != 2:
        raise config.unusable("channels", "2")
    return OscillatorBankPretransform(frames_per_latent=config.integer("frames_per_latent"))


@register_part("encoder", "patch_mlp")
def build_encoder(config: ConfigReader) -> PatchMlpEncoder:
    """Build the encoder from the `encoder.config` section of a checkpoint's config."""
    return PatchMlpEncoder(in_channels=config.integer("in_channels"), **_sizes(config))


@register_part("decoder", "patch_mlp")
def build_decoder(config: ConfigReader) -> PatchMlpDecoder:
    """Build the decoder from the `decoder.config` section of a checkpoint's config."""
    return PatchMlpDecoder(out_channels=config.integer("out_channels"), **_sizes(config))


def _sizes(config: ConfigReader) -> dict[str, int]:
    return {key: config.integer(key) for key in ("patch_frames", "width", "depth", "latent_dim")}
