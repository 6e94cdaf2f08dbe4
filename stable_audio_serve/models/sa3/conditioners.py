"""Embeds prompts and numbers as vectors: prompts with a text encoder and learned padding, numbers as Fourier features.

Everything runs in float32, except the text encoder, which runs in the dtype of its files.
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
    """Load the encoder of a T5Gemma in the dtype of its files. Raises CheckpointError if a file or key is missing.

    Attention uses the eager implementation of transformers, because fused kernels cannot soft-cap the logits.
    """
    tokenizer, encoder = load_tokenizer_and_network(folder, _load_t5gemma)
    config: Any = encoder.config.encoder  # type: ignore[union-attr]
    if not isinstance(config.sliding_window, int):
        raise CheckpointError(f"the text encoder in {folder} has no sliding_window in its config.json")
    if max_length > config.sliding_window // 2:  # longer prompts would need another mask in sliding-window layers
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
    """Converts a text encoder's hidden states to conditioning tokens, with a learned vector for padding.

    If the hidden states do not have the width of the tokens, a linear layer projects them.
    """

    def __init__(self, config: PromptConfig, *, encoder_width: int) -> None:
        super().__init__()
        self.padding_embedding = nn.Parameter(torch.zeros(config.width))
        self.proj_out = (
            nn.Linear(encoder_width, config.width)
            if config.project_out or encoder_width != config.width
            else nn.Identity()
        )

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Returns tokens (batch, tokens, width) float32.

        `hidden` is (batch, tokens, encoder width). `mask` (batch, tokens) is true for real tokens.
        """
        # `where` instead of multiplication with the mask: the hidden states of padding can have any value, even NaN.
        return torch.where(mask[..., None], self.proj_out(hidden), self.padding_embedding)


class NumberConditioner(nn.Module):
    """Clamps a number to its range and embeds it as one vector. Names of submodules match keys of checkpoints."""

    def __init__(self, config: NumberConfig) -> None:
        super().__init__()
        self.config = config
        embedding = nn.Sequential(ExpoFourier(config.features), nn.Linear(config.features, config.width))
        self.embedder = nn.ModuleDict({"embedding": embedding})

    def forward(self, values: Tensor) -> Tensor:
        """Returns embeddings (batch, width) float32 of numbers (batch,) float32."""
        low, high = self.config.minimum, self.config.maximum
        return self.embedder["embedding"]((values.clamp(low, high) - low) / (high - low))
