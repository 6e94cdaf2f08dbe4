"""Text encoders of checkpoints: a tokenizer and the network of a second repository, loaded from a folder.

Which network that is each family decides; what comes out of it means nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.protocol import PromptTokens

# From a folder to the network and transformers' report of the loading (`output_loading_info`).
NetworkLoader = Callable[[Path], tuple[nn.Module, Mapping[str, Any]]]


class TextEncoder:
    """A tokenizer and an encoder whose hidden states are `width` wide; not part of the checkpoint's own weights."""

    def __init__(self, tokenizer: Any, encoder: nn.Module, *, width: int, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.width = width
        self.max_length = max_length

    def tokenize(self, prompts: Sequence[str]) -> PromptTokens:
        """Returns tokens with T = `max_length`, cut or padded on the right.

        Of an empty prompt a T5Gemma has no real token, a T5 one, which ends the text.
        """
        encoded = self.tokenizer(
            list(prompts), truncation=True, max_length=self.max_length, padding="max_length", return_tensors="pt"
        )
        told = torch.stack((encoded["input_ids"], encoded["attention_mask"]), dim=1)
        return PromptTokens(told, chars_read(encoded, num_prompts=len(prompts)))

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Returns hidden states (B, T, width) float32; padded positions are never keys, their values arbitrary.

        Device work only: the host is asked for nothing and waits for nothing.
        """
        dtype = next(self.encoder.parameters()).dtype
        # Given two axes, the library asks the device whether there is padding, and waits; it takes four as they are.
        # Not minus infinity: a prompt without a real token must not become NaN.
        added = torch.zeros(len(mask), 1, 1, mask.shape[1], device=mask.device, dtype=dtype)
        added.masked_fill_(mask[:, None, None, :] == 0, torch.finfo(dtype).min)
        hidden: Tensor = self.encoder(input_ids=ids, attention_mask=added).last_hidden_state
        return hidden.float()


def chars_read(encoded: Any, *, num_prompts: int) -> tuple[int | None, ...]:
    """Returns how many of each prompt's first characters a tokenizer's answer stands for, None = all.

    None also where the tokenizer is not one of the `tokenizers` package, which alone knows.
    """
    if not encoded.is_fast:
        return (None,) * num_prompts
    return tuple(max(end for _, end in one.offsets) if one.overflowing else None for one in encoded.encodings)


def load_tokenizer_and_network(folder: Path, load_network: NetworkLoader) -> tuple[Any, nn.Module]:
    """Returns the tokenizer of a folder and its network, ready for inference.

    Raises CheckpointError when anything is missing; a weight absent from the files would be random.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        encoder, report = load_network(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="right")
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"the text encoder in {folder} cannot be loaded: {reason}") from error
    absent = sorted([*report["missing_keys"], *(str(key) for key in report.get("mismatched_keys", ()))])
    if absent:
        raise CheckpointError(f"the text encoder in {folder} lacks {len(absent)} weights, the first is {absent[0]}")
    return tokenizer, encoder.eval().requires_grad_(False)
