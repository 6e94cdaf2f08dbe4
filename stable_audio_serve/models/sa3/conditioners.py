"""Prompts and numbers as vectors: prompt embeddings with learned padding, and numbers as Fourier features.

Both run in float32 (the text encoder in the dtype of its own files) and are row-independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.blocks import ExpoFourier
from stable_audio_serve.models.sa3.config import NumberConfig, PromptConfig


class TextEncoder:
    """Tokenizer and the encoder half of a T5Gemma; not part of the checkpoint's own weights."""

    def __init__(self, tokenizer: Any, encoder: nn.Module, *, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.max_length = max_length

    @property
    def width(self) -> int:
        """Channels of one token."""
        return int(self.encoder.config.encoder.hidden_size)  # type: ignore[union-attr, arg-type]

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Returns ids and mask, (B, T) int64 with T = `max_length`: cut or padded on the right, mask 1 for real tokens.

        An empty prompt is all padding.
        """
        encoded = self.tokenizer(
            list(prompts),
            truncation=True,
            max_length=self.max_length,
            padding="max_length",
            return_tensors="pt",
        )
        return encoded["input_ids"], encoded["attention_mask"]

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Returns hidden states (B, T, width) float32; padded positions are never keys, their values arbitrary."""
        hidden: Tensor = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden.float()


def load_text_encoder(folder: Path, *, max_length: int, device: torch.device) -> TextEncoder:
    """Load from a folder with config, weights and tokenizer, in the dtype of its files; never uses the network.

    Attention runs in the library's explicit form, because the fused kernels cannot soft-cap the logits. Raises
    CheckpointError when anything is missing; a weight absent from the files would be random.
    """
    from transformers import AutoConfig, AutoTokenizer, T5GemmaEncoderModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        config.is_encoder_decoder = False  # the full model's files hold a decoder that is not used
        encoder, report = T5GemmaEncoderModel.from_pretrained(
            folder,
            config=config,
            dtype="auto",
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
            use_safetensors=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="right")
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"the text encoder in {folder} cannot be loaded: {reason}") from error
    absent = sorted([*report["missing_keys"], *(str(key) for key in report.get("mismatched_keys", ()))])
    if absent:
        raise CheckpointError(f"the text encoder in {folder} lacks {len(absent)} weights, the first is {absent[0]}")
    return TextEncoder(tokenizer, encoder.eval().requires_grad_(False).to(device), max_length=max_length)


class PromptConditioner(nn.Module):
    """Turns hidden states into conditioning tokens: projected where widths differ, a learned vector for padding."""

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
        # Selected, not multiplied: a padded position may hold anything.
        return torch.where(mask[..., None], self.proj_out(hidden), self.padding_embedding)


class _NumberEmbedder(nn.Module):
    def __init__(self, config: NumberConfig) -> None:
        super().__init__()
        self.embedding = nn.Sequential(ExpoFourier(config.features), nn.Linear(config.features, config.width))


class NumberConditioner(nn.Module):
    """Turns a number, clamped to its range, into one vector. Module names are the checkpoint's keys."""

    def __init__(self, config: NumberConfig) -> None:
        super().__init__()
        self.config = config
        self.embedder = _NumberEmbedder(config)

    def forward(self, values: Tensor) -> Tensor:
        """Returns (B, width) float32 of values (B,) float32 in their own unit."""
        low, high = self.config.minimum, self.config.maximum
        return self.embedder.embedding((values.clamp(low, high) - low) / (high - low))
