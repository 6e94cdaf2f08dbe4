"""Loads the text encoder of Stable Audio 3, a T5Gemma. It runs in its files' dtype, or bfloat16 for float8."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.text_encoder import TextEncoder, from_pretrained, load_tokenizer_and_network


def load_text_encoder(folder: Path, *, max_length: int, device: torch.device) -> TextEncoder:
    """Load the encoder of a T5Gemma. Raises CheckpointError if a file or key is missing.

    Attention uses the eager implementation of transformers, because fused kernels cannot soft-cap the logits.
    """
    tokenizer, encoder = load_tokenizer_and_network(folder, _load_t5gemma)
    config: Any = encoder.config.encoder  # type: ignore[union-attr]
    if not isinstance(config.sliding_window, int):
        raise CheckpointError(f"the text encoder in {folder} has no sliding_window in its config.json")
    if max_length > config.sliding_window // 2:  # longer prompts would need another mask in sliding-window layers
        raise CheckpointError(f"prompts of {max_length} tokens are longer than the text encoder's windows in {folder}")
    return TextEncoder(tokenizer, encoder.to(device), width=int(config.hidden_size), max_length=max_length)


def _load_t5gemma(folder: Path, dtype: torch.dtype | Literal["auto"]) -> tuple[nn.Module, Mapping[str, Any]]:
    from transformers import AutoConfig, T5GemmaEncoderModel

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.is_encoder_decoder = False  # the files also contain a decoder, which is not used
    return from_pretrained(T5GemmaEncoderModel, folder, dtype=dtype, config=config, attn_implementation="eager")
