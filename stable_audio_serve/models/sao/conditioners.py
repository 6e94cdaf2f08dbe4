"""Prompts and numbers as vectors for the Stable Audio Open family: a T5's hidden states and learned Fourier features.

All row-independent. What a row's context and global vector consist of is the config's order of ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.sao.config import NumberConfig, PromptConfig

_NUM_FREQUENCIES = 128


class TextEncoder:
    """Tokenizer and encoder of a T5; not part of the checkpoint's own weights."""

    def __init__(self, tokenizer: Any, encoder: nn.Module, *, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.max_length = max_length

    @property
    def width(self) -> int:
        """Channels of one token."""
        return int(self.encoder.config.d_model)  # type: ignore[union-attr, arg-type]

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Returns ids and mask, (B, T) int64 with T = `max_length`: cut or padded on the right, mask 1 for real tokens.

        The end of the text is a token of its own, so that an empty prompt has one.
        """
        encoded = self.tokenizer(
            list(prompts), truncation=True, max_length=self.max_length, padding="max_length", return_tensors="pt"
        )
        return encoded["input_ids"], encoded["attention_mask"]

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Returns hidden states (B, T, width) float32; padded positions are never keys, their values arbitrary."""
        hidden: Tensor = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden.float()


def load_text_encoder(folder: Path, *, max_length: int, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """Load from a folder with config, weights and tokenizer; never uses the network.

    The reference runs the encoder in float16 on every device, which moves its output by up to 1e-2. Raises
    CheckpointError when anything is missing; a weight absent from the files would be random.
    """
    from transformers import AutoTokenizer, T5EncoderModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        encoder, report = T5EncoderModel.from_pretrained(
            folder, dtype="auto", local_files_only=True, output_loading_info=True, use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="right")
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"the text encoder in {folder} cannot be loaded: {reason}") from error
    absent = sorted([*report["missing_keys"], *(str(key) for key in report.get("mismatched_keys", ()))])
    if absent:
        raise CheckpointError(f"the text encoder in {folder} lacks {len(absent)} weights, the first is {absent[0]}")
    # Cast here and not while loading, where the library would keep some layers of a half-precision T5 in float32.
    encoder = encoder.eval().requires_grad_(False).to(device=device, dtype=dtype)
    return TextEncoder(tokenizer, encoder, max_length=max_length)


class PromptConditioner(nn.Module):
    """Turns hidden states into conditioning tokens: projected where widths differ, zero for padding."""

    def __init__(self, config: PromptConfig, *, encoder_width: int) -> None:
        super().__init__()
        projects = config.project_out or encoder_width != config.width
        self.proj_out = nn.Linear(encoder_width, config.width) if projects else nn.Identity()

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Returns tokens (B, T, width) float32 of hidden (B, T, encoder width) and mask (B, T) bool."""
        # Selected, not multiplied: a padded position may hold anything.
        return torch.where(mask[..., None], self.proj_out(hidden), 0.0)


class _LearnedFrequencies(nn.Module):
    """`[u, sin a, cos a]` with `a = u w 2 pi`: sines first, unlike the diffusion time's features."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(_NUM_FREQUENCIES))

    def forward(self, u: Tensor) -> Tensor:
        angles = u[:, None] * self.weights * 2 * math.pi
        return torch.cat([u[:, None], angles.sin(), angles.cos()], dim=-1)


class _NumberEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Sequential(_LearnedFrequencies(), nn.Linear(2 * _NUM_FREQUENCIES + 1, width))


class NumberConditioner(nn.Module):
    """Turns a number, clamped to its range, into one vector. Module names are the checkpoint's keys."""

    def __init__(self, config: NumberConfig) -> None:
        super().__init__()
        self.config = config
        self.embedder = _NumberEmbedder(config.width)

    def forward(self, values: Tensor) -> Tensor:
        """Returns (B, width) float32 of values (B,) float32 in their own unit."""
        low, high = self.config.minimum, self.config.maximum
        return self.embedder.embedding((values.clamp(low, high) - low) / (high - low))
