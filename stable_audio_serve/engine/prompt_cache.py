"""Encoded prompts by exact text, least recently used first out, bounded by the memory they hold. Used by one thread."""

from __future__ import annotations

from collections import OrderedDict

from stable_audio_serve.models.protocol import TextEmbedding


class PromptCache:
    """An LRU of text embeddings holding at most `max_bytes`; 0 turns it off."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._embeddings: OrderedDict[str, TextEmbedding] = OrderedDict()

    def get(self, prompt: str) -> TextEmbedding | None:
        """The embedding of exactly this prompt, or None."""
        embedding = self._embeddings.get(prompt)
        if embedding is not None:
            self._embeddings.move_to_end(prompt)
        return embedding

    def put(self, embedding: TextEmbedding) -> None:
        """Keep an embedding, dropping the least recently used ones; one above the bound is not kept."""
        if embedding.num_bytes > self._max_bytes or embedding.prompt in self._embeddings:
            return
        self._embeddings[embedding.prompt] = embedding
        self._num_bytes += embedding.num_bytes
        while self._num_bytes > self._max_bytes:
            _, dropped = self._embeddings.popitem(last=False)
            self._num_bytes -= dropped.num_bytes

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._embeddings)
