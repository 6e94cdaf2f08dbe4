"""Encoded prompts by exact text, bounded by the memory they hold; the least recently used are dropped first."""

from __future__ import annotations

from collections import OrderedDict

from stable_audio_serve.models.protocol import TextEmbedding


class PromptCache:
    """An LRU cache of text embeddings of at most `max_bytes`; 0 turns it off. Not thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._embeddings: OrderedDict[str, TextEmbedding] = OrderedDict()

    def get(self, prompt: str) -> TextEmbedding | None:
        """Returns the embedding of exactly this prompt, or None."""
        embedding = self._embeddings.get(prompt)
        if embedding is not None:
            self._embeddings.move_to_end(prompt)
        return embedding

    def put(self, embedding: TextEmbedding) -> None:
        """Keep an embedding and drop the least recently used ones. An embedding above the bound is not kept."""
        if embedding.num_bytes > self._max_bytes or embedding.prompt in self._embeddings:
            return
        self._embeddings[embedding.prompt] = embedding
        self._num_bytes += embedding.num_bytes
        while self._num_bytes > self._max_bytes:
            _, dropped = self._embeddings.popitem(last=False)
            self._num_bytes -= dropped.num_bytes

    @property
    def num_bytes(self) -> int:
        """Memory held by the embeddings."""
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._embeddings)
