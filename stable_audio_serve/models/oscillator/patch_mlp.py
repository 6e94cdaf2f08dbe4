"""A small autoencoder: residual MLPs that map a patch (several consecutive frames of the oscillator bank) to one latent
and back. Each latent depends only on its own patch.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


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


class PatchEncoder(nn.Module):
    """Encodes every P frames as one latent: (batch, channels, P * F) -> (batch, latent channels, F)."""

    def __init__(self, *, in_channels: int, patch_frames: int, width: int, depth: int, latent_dim: int) -> None:
        super().__init__()
        self.patch_frames = patch_frames
        self.project_in = nn.Linear(in_channels * patch_frames, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.project_out = nn.Linear(width, latent_dim)

    def forward(self, frames: Tensor) -> Tensor:
        """Returns latents (batch, latent channels, patches) of frames (batch, channels, frames).

        The frames are padded with zeros to whole patches.
        """
        frames = F.pad(frames, (0, -frames.shape[2] % self.patch_frames))
        batch, channels, length = frames.shape
        patches = frames.reshape(batch, channels, length // self.patch_frames, self.patch_frames)
        # The values of a patch: all channels of its first frame, then all channels of the next frame.
        hidden = self.project_in(patches.permute(0, 2, 3, 1).flatten(2))
        for block in self.blocks:
            hidden = block(hidden)
        latents: Tensor = self.project_out(self.norm(hidden))
        return latents.transpose(1, 2)


class PatchDecoder(nn.Module):
    """Decodes each latent to P frames: (batch, latent channels, F) -> (batch, channels, P * F)."""

    def __init__(self, *, out_channels: int, patch_frames: int, width: int, depth: int, latent_dim: int) -> None:
        super().__init__()
        self.patch_frames = patch_frames
        self.out_channels = out_channels
        self.project_in = nn.Linear(latent_dim, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.project_out = nn.Linear(width, out_channels * patch_frames)
        nn.init.normal_(self.project_out.weight, std=0.1 * width**-0.5)

    def forward(self, latents: Tensor) -> Tensor:
        """Returns frames (batch, channels, F * frames per patch) of latents (batch, latent channels, F)."""
        hidden = self.project_in(latents.transpose(1, 2))
        for block in self.blocks:
            hidden = block(hidden)
        patches: Tensor = self.project_out(self.norm(hidden))
        batch, num_latents, _ = patches.shape
        frames = patches.reshape(batch, num_latents * self.patch_frames, self.out_channels)
        return frames.transpose(1, 2)
