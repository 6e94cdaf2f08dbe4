"""Embeds prompts and numbers as vectors: prompt embeddings with learned padding, numbers as Fourier features.

Both run in float32 (the text encoder in its files' dtype) and are row-independent.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.blocks import ExpoFourier
from stable_audio_serve.models.sa3.config import NumberConfig, PromptConfig
from stable_audio_serve.models.text_encoder import TextEncoder, load_tokenizer_and_network


def load_text_encoder(folder: Path, *, max_length: int, device: torch.device) -> TextEncoder:
    """Load the encoder half of a T5Gemma in its files' dtype. Raises CheckpointError if anything is missing.

    Attention uses the library's explicit form, because the fused kernels cannot soft-cap the logits.
    """
    tokenizer, encoder = load_tokenizer_and_network(folder, _load_t5gemma)
    config: Any = encoder.config.encoder  # type: ignore[union-attr]
    if max_length > config.sliding_window // 2:  # global and sliding layers have the same mask only up to this length
        raise CheckpointError(f"prompts of {max_length} tokens are longer than the text encoder's windows in {folder}")
    return TextEncoder(tokenizer, encoder.to(device), width=int(config.hidden_size), max_length=max_length)


def _load_t5gemma(folder: Path) -> tuple[nn.Module, Mapping[str, Any]]:
    from transformers import AutoConfig, T5GemmaEncoderModel

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.is_encoder_decoder = False  # the files also contain a decoder, which is not used
    loaded: tuple[nn.Module, Mapping[str, Any]] = T5GemmaEncoderModel.from_pretrained(
        folder,
        config=config,
        dtype="auto",
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
        use_safetensors=True,
    )
    return loaded


class PromptConditioner(nn.Module):
    """Converts hidden states to conditioning tokens: projected if widths differ, with a learned vector for padding."""

    def __init__(self, config: PromptConfig, *, encoder_width: int) -> None:
        super().__init__()
        self.padding_embedding = nn.Parameter(torch.zeros(config.width))
        self.proj_out = (
            nn.Linear(encoder_width, config.width)
            if config.project_out or encoder_width != config.width
            else nn.Identity()
        )

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Returns tokens (B, T, width) float32 of hidden (B, T, encoder width) and mask (B, T) bool."""
        # Select instead of multiplying: padding can contain any value, even NaN.
        return torch.where(mask[..., None], self.proj_out(hidden), self.padding_embedding)


class _NumberEmbedder(nn.Module):
    def __init__(self, config: NumberConfig) -> None:
        super().__init__()
        self.embedding = nn.Sequential(ExpoFourier(config.features), nn.Linear(config.features, config.width))


class NumberConditioner(nn.Module):
    """Embeds a number, clamped to its range, as one vector. Module names match the checkpoint's keys."""

    def __init__(self, config: NumberConfig) -> None:
        super().__init__()
        self.config = config
        self.embedder = _NumberEmbedder(config)

    def forward(self, values: Tensor) -> Tensor:
        """Returns (B, width) float32 of values (B,) float32 in the number's unit."""
        low, high = self.config.minimum, self.config.maximum
        return self.embedder.embedding((values.clamp(low, high) - low) / (high - low))
