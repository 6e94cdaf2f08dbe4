"""The base class of this project's own models of both families: converts prompts to embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stable_audio_serve.models.protocol import ModelSpec, PromptTokens, TextEmbedding
from stable_audio_serve.models.switches import exact
from stable_audio_serve.models.text_encoder import TextEncoder
from stable_audio_serve.sampling.transfer import to_device


class NativeModel:
    """Base class of a model: implements text encoding, `spec` and `device`. Public methods run without gradients."""

    def __init__(
        self, text: TextEncoder, prompt: nn.Module, *, text_width: int, spec: ModelSpec, device: torch.device
    ) -> None:
        """`prompt` converts the encoder's output to embeddings with `text_width` channels, and fills in the padding."""
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
        """Returns the number of tokens per prompt, padding included, and the width of a token's embedding."""
        return self.text.max_length, self._text_width

    def tokenize(self, prompts: Sequence[str]) -> PromptTokens:
        """Returns the prompts' tokens, truncated or padded to the encoder's fixed number of tokens."""
        return self.text.tokenize(prompts)

    @torch.inference_mode()
    @exact
    def embed_tokens(self, ids_and_mask: Tensor) -> Tensor:
        """Returns embeddings (prompts, tokens, width) float32 of token ids and their mask (prompts, 2, tokens).

        Both are on the device. A padding token's embedding is a learned vector (Stable Audio 3) or zero (Stable Audio
        Open).
        """
        ids, mask = ids_and_mask.unbind(1)
        embeddings: Tensor = self.prompt(self.text.encode(ids, mask), mask.bool())
        return embeddings

    @torch.inference_mode()
    def encode_text(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        """Returns each prompt's embedding (tokens, width), computed by `embed_tokens`, and its mask of real tokens."""
        tokens = self.tokenize(prompts)
        ids_and_mask = to_device(tokens.ids_and_mask, self._device)
        return TextEmbedding.each(
            prompts, self.embed_tokens(ids_and_mask), mask=ids_and_mask[:, 1], chars_read=tokens.chars_read
        )
