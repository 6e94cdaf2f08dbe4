"""What the native models of both families share: how prompts become embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stable_audio_serve.models.protocol import ModelSpec, PromptTokens, TextEmbedding
from stable_audio_serve.models.switches import exact
from stable_audio_serve.models.text_encoder import TextEncoder
from stable_audio_serve.sampling.transfer import to_device


class NativeModel:
    """The text side of a model, its spec and its device. Public methods run without gradients."""

    def __init__(
        self, text: TextEncoder, prompt: nn.Module, *, text_width: int, spec: ModelSpec, device: torch.device
    ) -> None:
        """`prompt` turns the encoder's output into embeddings with `text_width` channels, and fills padding."""
        self.text = text
        self.prompt = prompt
        self._text_width = text_width
        self._spec = spec
        self._device = device

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def text_size(self) -> tuple[int, int]:
        """The number of tokens per prompt, padding included, and the width of their embeddings."""
        return self.text.max_length, self._text_width

    def tokenize(self, prompts: Sequence[str]) -> PromptTokens:
        """Returns the prompts' tokens, truncated or padded to T."""
        return self.text.tokenize(prompts)

    @torch.inference_mode()
    @exact
    def embed_tokens(self, ids_and_mask: Tensor) -> Tensor:
        """Returns embeddings (B, T, width) float32 of ids and mask (B, 2, T) on the device.

        Padding has the learned vector (Stable Audio 3) or zeros (Stable Audio Open).
        """
        ids, mask = ids_and_mask.unbind(1)
        embeddings: Tensor = self.prompt(self.text.encode(ids, mask), mask.bool())
        return embeddings

    @torch.inference_mode()
    def encode_text(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        """Returns embeddings (T, width) float32 as of `embed_tokens`, and the mask of real tokens."""
        tokens = self.tokenize(prompts)
        ids_and_mask = to_device(tokens.ids_and_mask, self._device)
        return TextEmbedding.each(
            prompts, self.embed_tokens(ids_and_mask), mask=ids_and_mask[:, 1], chars_read=tokens.chars_read
        )
