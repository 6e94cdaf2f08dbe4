"""Loads the text encoder of Stable Audio Open models, a T5, and computes the features of numbers."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from stable_audio_serve.models.sao.config import NUM_FREQUENCIES
from stable_audio_serve.models.sao.t5 import T5Encoder
from stable_audio_serve.models.text_encoder import TextEncoder, load_encoder


def load_text_encoder(folder: Path, *, max_length: int, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """Load the encoder of a T5. Raises CheckpointError if a file or key is missing.

    For checkpoints, `dtype` must be float16, as in the reference implementation. Compared with float32, float16 changes
    the output of T5 by up to 1e-2.
    """
    return load_encoder(folder, T5Encoder, max_length=max_length, device=device, dtype=dtype)


class LearnedFrequencies(nn.Module):
    """Maps a number u to `[u, sin a, cos a]`, with `a = 2 pi u w` and learned frequencies w."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.empty(NUM_FREQUENCIES).normal_())

    def forward(self, u: Tensor) -> Tensor:
        angles = u[:, None] * self.weights * 2 * math.pi
        return torch.cat([u[:, None], angles.sin(), angles.cos()], dim=-1)
