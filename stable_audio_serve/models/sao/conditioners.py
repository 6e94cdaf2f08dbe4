"""Embeds prompts and numbers as vectors: prompts with a T5 encoder, numbers as learned Fourier features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_audio_serve.models.sao.config import NumberConfig, PromptConfig
from stable_audio_serve.models.text_encoder import TextEncoder, load_tokenizer_and_network

_NUM_FREQUENCIES = 128


def load_text_encoder(folder: Path, *, max_length: int, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """Load the encoder of a T5. Raises CheckpointError if a file or key is missing.

    For checkpoints, `dtype` must be float16, as in the reference implementation. Compared with float32, float16 changes
    the output of T5 by up to 1e-2.
    """
    tokenizer, encoder = load_tokenizer_and_network(folder, _load_t5)
    width = int(encoder.config.d_model)  # type: ignore[union-attr, arg-type]
    # Cast here, not while loading, because transformers would keep some layers of a half-precision T5 in float32.
    return TextEncoder(tokenizer, encoder.to(device=device, dtype=dtype), width=width, max_length=max_length)


def _load_t5(folder: Path) -> tuple[nn.Module, Mapping[str, Any]]:
    from transformers import T5EncoderModel

    loaded: tuple[nn.Module, Mapping[str, Any]] = T5EncoderModel.from_pretrained(
        folder, dtype="auto", local_files_only=True, output_loading_info=True, use_safetensors=True
    )
    return loaded


class PromptConditioner(nn.Module):
    """Converts a text encoder's hidden states to conditioning tokens, with zeros for padding.

    If the hidden states do not have the width of the tokens, a linear layer projects them.
    """

    def __init__(self, config: PromptConfig, *, encoder_width: int) -> None:
        super().__init__()
        projects = config.project_out or encoder_width != config.width
        self.proj_out = nn.Linear(encoder_width, config.width) if projects else nn.Identity()

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Returns tokens (batch, tokens, width) float32.

        `hidden` is (batch, tokens, encoder width). `mask` (batch, tokens) is true for real tokens.
        """
        # `where` instead of multiplication with the mask: the hidden states of padding can have any value, even NaN.
        return torch.where(mask[..., None], self.proj_out(hidden), 0.0)


class _LearnedFrequencies(nn.Module):
    """Maps a number u to `[u, sin a, cos a]`, with `a = 2 pi u w` and learned frequencies w."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.empty(_NUM_FREQUENCIES).normal_())

    def forward(self, u: Tensor) -> Tensor:
        angles = u[:, None] * self.weights * 2 * math.pi
        return torch.cat([u[:, None], angles.sin(), angles.cos()], dim=-1)


class NumberConditioner(nn.Module):
    """Clamps a number to its range and embeds it as one vector. Names of submodules match keys of checkpoints."""

    def __init__(self, config: NumberConfig) -> None:
        super().__init__()
        self.config = config
        embedding = nn.Sequential(_LearnedFrequencies(), nn.Linear(2 * _NUM_FREQUENCIES + 1, config.width))
        self.embedder = nn.ModuleDict({"embedding": embedding})

    def forward(self, values: Tensor) -> Tensor:
        """Returns embeddings (batch, width) float32 of numbers (batch,) float32."""
        low, high = self.config.minimum, self.config.maximum
        return self.embedder["embedding"]((values.clamp(low, high) - low) / (high - low))
