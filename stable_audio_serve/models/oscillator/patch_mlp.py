"""A small autoencoder over parameter frames: residual MLPs that map a patch of frames to one latent and back.

Each latent depends on its own patch only, so there is no receptive field beyond the patch.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """x + W2 silu(W1 norm(x)), where the RMS norm has a gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the shape of x, (..., width)."""
        return x + self.down(F.silu(self.up(self.norm(x))))


class PatchEncoder(nn.Module):
    """Frames (B, C, P F) -> latents (B, D, F): P frames of C channels become one latent."""

    def __init__(self, *, in_channels: int, patch_frames: int, width: int, depth: int, latent_dim: int) -> None:
        super().__init__()
        self.patch_frames = patch_frames
        self.project_in = nn.Linear(in_channels * patch_frames, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.project_out = nn.Linear(width, latent_dim)

    def forward(self, frames: Tensor) -> Tensor:
        """Returns latents (B, D, F) of frames (B, C, N), zero-padded to whole patches; row- and patch-independent."""
        frames = F.pad(frames, (0, -frames.shape[2] % self.patch_frames))
        batch, channels, length = frames.shape
        patches = frames.reshape(batch, channels, length // self.patch_frames, self.patch_frames)
        hidden = self.project_in(patches.permute(0, 2, 3, 1).flatten(2))  # frame-major inside a patch
        for block in self.blocks:
            hidden = block(hidden)
        latents: Tensor = self.project_out(self.norm(hidden))
        return latents.transpose(1, 2)


class PatchDecoder(nn.Module):
    """Latents (B, D, F) -> frames (B, C, P F)."""

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
        """Returns frames (B, C, P F) of latents (B, D, F); row- and patch-independent."""
        hidden = self.project_in(latents.transpose(1, 2))
        for block in self.blocks:
            hidden = block(hidden)
        patches: Tensor = self.project_out(self.norm(hidden))
        batch, num_latents, _ = patches.shape
        frames = patches.reshape(batch, num_latents * self.patch_frames, self.out_channels)
        return frames.transpose(1, 2)
