"""The demo model's autoencoder parts: pretransform `oscillator_bank`, encoder and decoder `patch_mlp`.

The modules `bank` and `analysis` of this folder have the oscillator bank's arithmetic. `patch_mlp` is a small
autoencoder of residual MLPs that map a patch (several consecutive frames of the oscillator bank) to one latent and
back. Each latent depends only on its own patch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.oscillator.analysis import analyse
from stable_audio_serve.models.oscillator.bank import FRAME_SAMPLES, OscillatorBank
from stable_audio_serve.models.parts import Noises, WindowNoise, stack_draws


class ResidualBlock(nn.Module):
    """`x + W2 silu(W1 norm(x))`, where `norm` is an RMS norm with a learned gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return x + self.down(F.silu(self.up(self.norm(x))))


class PatchMlpEncoder(nn.Module):
    """Encodes every P frames as one latent: (batch, channels, P * F) -> (batch, latent channels, F).

    Implements `parts.Encoder`.
    """

    noisy = False

    def __init__(self, *, in_channels: int, patch_frames: int, width: int, depth: int, latent_dim: int) -> None:
        super().__init__()
        self.frames_per_latent = patch_frames
        self.project_in = nn.Linear(in_channels * patch_frames, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.project_out = nn.Linear(width, latent_dim)

    def forward(self, frames: Tensor, noise: Noises = None) -> Tensor:
        """Returns latents (batch, latent channels, patches) of frames (batch, channels, frames). `noise` is not used.

        The frames are padded with zeros to whole patches.
        """
        frames = F.pad(frames, (0, -frames.shape[2] % self.frames_per_latent))
        batch, channels, length = frames.shape
        patches = frames.reshape(batch, channels, length // self.frames_per_latent, self.frames_per_latent)
        # The values of a patch: all channels of its first frame, then all channels of the next frame.
        hidden = self.project_in(patches.permute(0, 2, 3, 1).flatten(2))
        for block in self.blocks:
            hidden = block(hidden)
        latents: Tensor = self.project_out(self.norm(hidden))
        return latents.transpose(1, 2)


class PatchMlpDecoder(nn.Module):
    """Decodes each latent to P frames: (batch, latent channels, F) -> (batch, channels, P * F).

    Implements `parts.Decoder`.
    """

    latent_multiple = 1
    halo_latents = 0

    def __init__(self, *, out_channels: int, patch_frames: int, width: int, depth: int, latent_dim: int) -> None:
        super().__init__()
        self.frames_per_latent = patch_frames
        self.out_channels = out_channels
        self.project_in = nn.Linear(latent_dim, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.project_out = nn.Linear(width, out_channels * patch_frames)
        nn.init.normal_(self.project_out.weight, std=0.1 * width**-0.5)

    def forward(self, latents: Tensor, noise: Noises = None) -> Tensor:
        """Returns frames (batch, channels, F * frames per patch) of latents (batch, latent channels, F).

        `noise` is not used.
        """
        hidden = self.project_in(latents.transpose(1, 2))
        for block in self.blocks:
            hidden = block(hidden)
        patches: Tensor = self.project_out(self.norm(hidden))
        batch, num_latents, _ = patches.shape
        frames = patches.reshape(batch, num_latents * self.frames_per_latent, self.out_channels)
        return frames.transpose(1, 2)


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


def build_oscillator_bank(config: ConfigReader) -> OscillatorBankPretransform:
    """Build the pretransform from the innermost `pretransform.config` section of a checkpoint's config."""
    if config.integer("channels", default=2) != 2:
        raise config.unusable("channels", "2")
    return OscillatorBankPretransform(frames_per_latent=config.integer("frames_per_latent"))


def build_encoder(config: ConfigReader) -> PatchMlpEncoder:
    """Build the encoder from the `encoder.config` section of a checkpoint's config."""
    return PatchMlpEncoder(in_channels=config.integer("in_channels"), **_sizes(config))


def build_decoder(config: ConfigReader) -> PatchMlpDecoder:
    """Build the decoder from the `decoder.config` section of a checkpoint's config."""
    return PatchMlpDecoder(out_channels=config.integer("out_channels"), **_sizes(config))


def _sizes(config: ConfigReader) -> dict[str, int]:
    return {key: config.integer(key) for key in ("patch_frames", "width", "depth", "latent_dim")}
